"""The parts that every format's reader and writer uses."""
