"""`python -m personmae` is the `personmae` command."""

from personmae.cli import main

if __name__ == "__main__":
    main()
