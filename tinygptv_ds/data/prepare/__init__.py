"""The command ``prepare`` and its parts, and the commands that convert caption lists for img2dataset."""
