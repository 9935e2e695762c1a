"""The records of a zip archive, for the reader and the writer of stored ones (PKWARE's APPNOTE, section 4.3)."""

from __future__ import annotations

import struct

END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
WIDE_LOCAL = struct.Struct("<2H2Q")
JANUARY_1980 = 1 << 5 | 1

# zipfile writes 64-bit fields from here on, although 32 bits hold twice as much.
ZIP64_FROM = 2**31 - 1
