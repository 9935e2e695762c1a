"""The structure of an HDF5 file, found without libhdf5: the bytes that can be nobody's numbers.

Files as Keras writes them (superblock 0, object headers of version 1) have no checksums, so a damaged address of a
dataset may lead into the structure, and libhdf5 reads that as numbers. What newer files have instead (superblock 2 or
3, headers and indexes with checksums) is not followed here. Source: the HDF5 File Format Specification, version 3.0.

The survey's process imports this: nothing but the standard library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["Blocks", "MalformedError"]

SUPERBLOCK_BYTES = 48
"""Of the shortest, which is version 2's and 3's."""
HEADER_BYTES = 16
"""Of an object header, before its messages; a block that goes on with them has none."""
MOST_BLOCKS = 500_000
DEEPEST_TREE = 16

LINK_INFO, LAYOUT, ATTRIBUTE, CONTINUATION, SYMBOL_TABLE, ATTRIBUTE_INFO = 0x02, 0x08, 0x0C, 0x10, 0x11, 0x15
PLAIN_CLASSES = (0, 1, 3)
"""Integers, floats and texts of fixed length lie in the attribute itself."""
VARIABLE_LENGTH, IS_TEXT = 9, 1
UNDEFINED = 2**64 - 1


class MalformedError(Exception):
    """The structure contradicts itself; the text says where and how."""


class Blocks:
    """Every block of the structure that can be reached from the superblock.

    Attributes:
        found: for each block's first byte, its end and what it is.
        complete: whether these are all; newer or rarer structures are not followed.
    """

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        self.stream = stream
        self.size_bytes = size_bytes
        self.found: dict[int, tuple[int, str]] = {}
        head = self.read(0, SUPERBLOCK_BYTES, "superblock")
        version = head[8]
        self.complete = version < 2 and head[13:15] == b"\x08\x08"  # bytes of an address, bytes of a length
        if not self.complete:
            self.take(0, SUPERBLOCK_BYTES, "superblock")
            return
        self.leaf_k, self.internal_k = struct.unpack_from("<HH", head, 16)
        root = 24 + 4 * version + 4 * 8  # the root's symbol, of 40 bytes, after four addresses
        head = self.take(0, root + 40, "superblock")
        self.add_objects(struct.unpack_from("<Q", head, root + 8)[0])

    def read(self, at: int, count: int, what: str) -> bytes:
        """Bytes that must be in the file."""
        if at + count > self.size_bytes:
            raise MalformedError(f"a {what} at byte {at}, of a file of {self.size_bytes}")
        self.stream.seek(at)
        return self.stream.read(count)

    def take(self, at: int, count: int, what: str, signature: bytes = b"") -> bytes:
        """The bytes of a block, which is noted."""
        if at in self.found:
            raise MalformedError(f"a {what} at byte {at}, where a {self.found[at][1]} is")
        if len(self.found) >= MOST_BLOCKS:
            raise MalformedError(f"more than {MOST_BLOCKS} blocks")
        data = self.read(at, count, what)
        if not data.startswith(signature):
            raise MalformedError(f"no {what} at byte {at}")
        self.found[at] = (at + count, what)
        return data

    # ---- objects

    def add_objects(self, root: int) -> None:
        """Object headers, and what their messages lead to."""
        waiting = [root]
        while waiting:
            for kind, body in self.messages(waiting.pop()):
                if kind == SYMBOL_TABLE:
                    tree, heap = struct.unpack_from("<QQ", body)
                    self.add_heap(heap)
                    waiting += self.members(tree)
                elif kind == ATTRIBUTE:
                    self.add_texts(body)
                elif kind in (LINK_INFO, ATTRIBUTE_INFO):
                    self.complete = False

    def messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """The messages of an object header, with their kinds."""
        what = "object header"
        if self.found.get(address, (0, ""))[1] == what:
            return  # the survey names what stands twice
        head = self.read(address, HEADER_BYTES, what)
        if head[0] != 1:  # a newer one has a signature and a checksum, and lies in a file of newer structures
            self.complete = False
            return
        blocks = [(address, HEADER_BYTES, HEADER_BYTES + struct.unpack_from("<I", head, 8)[0])]
        while blocks:
            begin, at, length = blocks.pop()
            data = self.take(begin, length, what)
            while at + 8 <= length:
                kind, size = struct.unpack_from("<HH", data, at)
                body = data[at + 8 : at + 8 + size]
                if kind == CONTINUATION:
                    place, count = struct.unpack_from("<QQ", body)
                    blocks.append((place, 0, count))
                yield kind, body
                at += 8 + size

    # ---- groups

    def add_heap(self, address: int) -> None:
        """A group's names, in which each free part leads to the next, and the last says 1."""
        head = self.take(address, 32, "local heap", b"HEAP")
        count, free, segment = struct.unpack_from("<QQQ", head, 8)
        data = self.take(segment, count, "local heap's data")
        seen: set[int] = set()
        while free != 1:
            if free in seen or free + 16 > count:
                raise MalformedError(f"a local heap at byte {address} whose free part at {free} of {count} has no end")
            seen.add(free)
            (free,) = struct.unpack_from("<Q", data, free)

    def members(self, tree: int) -> Iterator[int]:
        """The object headers of a group's members."""
        most = 2 * self.internal_k
        waiting = [(tree, 0)]
        while waiting:
            address, depth = waiting.pop()
            if depth > DEEPEST_TREE:
                raise MalformedError(f"a tree of more than {DEEPEST_TREE} levels")
            node = self.take(address, 24 + 8 * (2 * most + 1), "tree's node", b"TREE")
            level, used = struct.unpack_from("<BH", node, 5)
            for number in range(min(used, most)):
                (child,) = struct.unpack_from("<Q", node, 32 + 16 * number)
                if level:
                    waiting.append((child, depth + 1))
                else:
                    yield from self.symbols(child)

    def symbols(self, address: int) -> Iterator[int]:
        """The object headers of one node of symbols."""
        most = 2 * self.leaf_k
        node = self.take(address, 8 + 40 * most, "node of symbols", b"SNOD")
        (used,) = struct.unpack_from("<H", node, 6)
        for number in range(min(used, most)):
            (header,) = struct.unpack_from("<Q", node, 8 + 40 * number + 8)
            if header != UNDEFINED:  # as of a soft link
                yield header

    # ---- lists of names

    def add_texts(self, body: bytes) -> None:
        """The global heaps that an attribute's texts of variable length lie in."""
        version, flags, *sizes = struct.unpack_from("<BBHHH", body)
        name, dtype, space = (-(-size // 8) * 8 for size in sizes) if version == 1 else sizes
        at = (9 if version == 3 else 8) + name
        kind = body[at] & 15
        is_text = kind == VARIABLE_LENGTH and body[at + 1] & 15 == IS_TEXT
        if (version > 1 and flags) or not (is_text or kind in PLAIN_CLASSES):
            self.complete = False
        elif is_text:
            for place in range(at + dtype + space, len(body) - 15, 16):
                (heap,) = struct.unpack_from("<Q", body, place + 4)
                if heap not in (0, UNDEFINED) and self.found.get(heap, (0, ""))[1] != "global heap":
                    self.add_global_heap(heap)

    def add_global_heap(self, address: int) -> None:
        """Texts one after the other; number 0 is the free part, whose size is all of it."""
        what = "global heap"
        (count,) = struct.unpack_from("<Q", self.read(address, 16, what), 8)
        data = self.take(address, count, what, b"GCOL")
        at = 16
        while at + 16 <= count:
            number, size = struct.unpack_from("<H6xQ", data, at)
            step = 16 + -(-size // 8) * 8 if number else size
            if step < 16 or at + step > count:
                raise MalformedError(f"a {what} at byte {address} whose part at {at} of {count} has {size} bytes")
            at += step
