"""Run the command line as `python -m lens_unlearn`."""

from lens_unlearn.cli import main

if __name__ == "__main__":
    main()
