"""Names of the files that explain why a run hangs, in its run directory. The verb `doctor` reads them."""

FOLDER = "stacks"
STACKS = "rank-"  # rank-N.txt: the stacks of all threads of rank N
COLLECTIVES = "collectives_rank_"  # collectives_rank_N: what torch's flight recorder holds on rank N
