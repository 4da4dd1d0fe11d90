"""The tests of `--ray`: real clusters of several nodes on this machine."""
