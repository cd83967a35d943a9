"""What backs the figures; a regular package, since pyarrow up to 17 installs one of the same name."""
