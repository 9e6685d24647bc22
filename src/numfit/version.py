"""The version, apart from everything else so that any room may read it."""

VERSION = "0.1.0"
