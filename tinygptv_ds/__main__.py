"""`python -m tinygptv_ds`."""

from tinygptv_ds.cli import main

if __name__ == "__main__":
    main()
