"""Graph passes, one a file: capture, match, insert, lower, merge. Imported as ``lorafx.passes``."""
