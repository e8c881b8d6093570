"""What can become of an object's bytes: cut short, bits turned, words zeroed or made huge, pieces copied over others.

Each section is hit as often as another, whatever its size, and so are the header and the table of sections; so every
reader gets its share. The same seed gives the same damage.
"""

from __future__ import annotations

import random
import struct

from probefleet_wire.elf import Elf


def damaged(whole: bytes, random_: random.Random) -> bytes:
    """One of the ways to go wrong: cut, bytes changed, zeroed, copied over; in any section as likely as in another."""
    made = bytearray(whole)
    sections = [each for each in Elf.parse(whole).sections if each.data]
    (table,) = struct.unpack_from("<Q", whole, 40)
    places = [(whole.index(each.data), len(each.data)) for each in sections] + [(0, 64), (table, len(whole) - table)]
    for _ in range(random_.choice((1, 1, 2, 3, 5))):
        start, size = random_.choice(places)
        at = start + random_.randrange(size)
        match random_.randrange(8):
            case 0:
                return bytes(made[: random_.randrange(len(made))])
            case 1:
                made[at : at + 8] = bytes(len(made[at : at + 8]))
            case 2:
                from_start, from_size = random_.choice(places)
                piece = made[from_start : from_start + min(from_size, random_.randrange(1, 65))]
                made[at : at + len(piece)] = piece[: len(made[at : at + len(piece)])]
            case 3:
                word = random_.choice((0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 1, len(whole)))
                made[at : at + 4] = word.to_bytes(4, "little")[: len(made[at : at + 4])]
            case _:
                made[at] ^= 1 << random_.randrange(8)
    return bytes(made)
