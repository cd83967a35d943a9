#!/usr/bin/env bash
''':'  # bash continues in start.sh and never returns; Python reads these lines as a string and continues below
exec bash "$(dirname "$(readlink -f "$0")")/start.sh" stage1 "$@"
'''
# "deepspeed launch/stage1.sh" starts this very file with Python in every rank.
import pathlib, runpy
runpy.run_path(str(pathlib.Path(__file__).resolve().parents[1] / "stages" / "stage1.py"), run_name="__main__")
#'
