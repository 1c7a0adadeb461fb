"""`python -m skilltrace`: the command line."""

from skilltrace.cli import main

if __name__ == "__main__":
    main(prog_name="skilltrace")
