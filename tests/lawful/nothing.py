"""The good folder itself."""

from lawful import Oddity

ODDITIES = [Oddity("nothing odd", lambda folder: None)]
