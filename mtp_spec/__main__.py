"""`python -m mtp_spec` is the command line."""

from mtp_spec.cli.main import main

if __name__ == "__main__":
    main()
