"""Compressed networks in engines: how fast, how large and how accurate they are."""
