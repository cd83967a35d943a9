"""The nodes of a hostfile, looked at over ssh: are they alike, and how fast are they together."""
