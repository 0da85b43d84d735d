"""The commands of ``python -m torchrec_hilomoe``: modules with ``main(argv) -> exit code``."""
