"""The evaluation scripts, and the plug-in for lmms-eval."""
