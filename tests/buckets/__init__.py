"""Buckets of both kinds, on real servers of this machine."""
