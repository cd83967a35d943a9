"""The command `doctor`: checks of this machine, and of the hosts of a hostfile over ssh."""
