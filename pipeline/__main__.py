"""Makes `python -m prefixquant.pipeline` the command line: a submitted job has the package, not its console script."""

from prefixquant.pipeline.cli import main

if __name__ == "__main__":
    main()
