"""`python -m supar_cli` is `supar`."""

from supar_cli.cli.app import main

if __name__ == "__main__":
    main()
