"""A verb of the command line called in this process, so that its errors come as exceptions."""

import argparse
from types import ModuleType


def call(verb: ModuleType, *argv: object) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    verb.run(parser.parse_args([str(argument) for argument in argv]))
