"""The tests of the service: real servers on the loopback."""
