"""`python -m gptj` is `gptj`."""

from gptj.cli import main

if __name__ == "__main__":
    main()
