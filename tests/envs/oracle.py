"""A slow describer of Craftax-Classic in plain Python: the truth for all levels."""

import numpy as np
from craftax.craftax_classic.constants import BlockType

BLOCKS = np.array([2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])  # in any world
HERE = (3, 4)  # the player's cell of the view
ITEMS = ["wood", "stone", "coal", "iron", "diamond", "sapling"]
ITEMS += ["wood_pickaxe", "stone_pickaxe", "iron_pickaxe"]
ITEMS += ["wood_sword", "stone_sword", "iron_sword"]
STEP_TO = {1: (0, -1), 2: (0, 1), 3: (-1, 0), 4: (1, 0)}


def crop(state):
    """Name what stands on each of the 7 x 9 cells; None beyond the map."""
    top = int(state.player_position[0]) - HERE[0]
    left = int(state.player_position[1]) - HERE[1]
    tiles = {}
    for row in range(7):
        for column in range(9):
            y, x = top + row, left + column
            inside = 0 <= y < 64 and 0 <= x < 64
            name = BlockType(int(state.map[y, x])).name.lower() if inside else None
            tiles[row, column] = "table" if name == "crafting_table" else name
    for name in ("zombie", "cow", "skeleton", "arrow"):
        mobs = getattr(state, name + "s")
        for (y, x), alive in zip(mobs.position, mobs.mask, strict=True):
            if alive and (int(y) - top, int(x) - left) in tiles:
                tiles[int(y) - top, int(x) - left] = name
    return tiles


def scan_order(tiles):
    """Columns west to east, each north to south, without the player's cell."""
    for cell in sorted(tiles, key=lambda cell: (cell[1], cell[0])):
        if cell != HERE and tiles[cell] is not None:
            yield cell, (cell[0] - HERE[0], cell[1] - HERE[1]), tiles[cell]


def distance(offset):
    return abs(offset[0]) + abs(offset[1])


def drop_farthest(lines, count):
    """Keep the ``count`` nearest (name, offset, ...), in the order given."""
    rank = sorted(lines, key=lambda line: (distance(line[1]), line[1][1], line[1][0]))
    return [line for line in lines if line in rank[:count]]


def find_nearest(named):
    """Map each name, in the order of finding, to its nearest offset."""
    best = {}
    for name, offset in named:
        if name not in best or distance(offset) < distance(best[name]):
            best[name] = offset
    return best


def faced(state, tiles):
    row, column = STEP_TO[int(state.player_direction)]
    return tiles[HERE[0] + row, HERE[1] + column]


def compact(state):
    tiles = crop(state)
    words = []
    for side, code in (("n", 3), ("e", 2), ("s", 4), ("w", 1)):
        cell = (HERE[0] + STEP_TO[code][0], HERE[1] + STEP_TO[code][1])
        mark = ">" if int(state.player_direction) == code else "="
        words.append(f"{side}{mark}{tiles[cell] or 'edge'}")
    for vital in ("health", "food", "drink", "energy"):
        words.append(f"{vital}={int(getattr(state, f'player_{vital}'))}")
    words.append(
        f"light={int(np.round(np.float32(10) * np.float32(state.light_level)))}"
    )
    if state.is_sleeping:
        words.append("asleep")
    for item in ITEMS:
        if count := int(getattr(state.inventory, item)):
            words.append(f"{item}={count}")
    seen = [(name, offset) for _, offset, name in scan_order(tiles)]
    kinds = [
        (name, offset)
        for name, offset in find_nearest(seen).items()
        if name not in ("grass", "sand", "path")
    ]
    order = [block.name.lower() for block in BlockType]
    order[order.index("crafting_table")] = "table"
    order += ["zombie", "cow", "skeleton", "arrow"]
    room = (40 - 1 - len(words) - 1) // 2
    for name, (row, column) in sorted(
        drop_farthest(kinds, room), key=lambda kind: order.index(kind[0])
    ):
        words.append(name)
        words.append(
            (f"{-row}n" if row < 0 else f"{row}s" if row else "")
            + (f"{-column}w" if column < 0 else f"{column}e" if column else "")
        )
    return "\n " + " ".join([*words, ">"])


def balrog(state):
    tiles = {cell: _crafter_name(name) for cell, name in crop(state).items()}
    seen = [(name, offset) for _, offset, name in scan_order(tiles)]
    lines = drop_farthest(list(find_nearest(seen).items()), 12)
    front = faced(state, tiles) or "nothing"
    return _balrog_text(state, [f"{n} {_far(o)}" for n, o in lines], front)


def balrog_precise(state):
    tiles = {cell: _crafter_name(name) for cell, name in crop(state).items()}
    with_player = {**tiles, HERE: "player"}
    lines = []
    for (row, column), offset, name in scan_order(tiles):
        around = [(row - 1, column), (row + 1, column), (row, column - 1)]
        around.append((row, column + 1))
        others = {with_player.get(cell) for cell in around} - {None, name}
        inner = name in ("water", "lava") and not others
        if name not in ("grass", "sand", "path") and not inner:
            lines.append((name, offset))
    lines = drop_farthest(lines, 54)
    front = faced(state, tiles)
    if front in ("grass", "sand", "path", None):
        front = "nothing"
    return _balrog_text(state, [f"{n} {_precise(o)}" for n, o in lines], front)


def _crafter_name(name):
    return "plant" if name == "ripe_plant" else name


def _steps(count):
    return f"{count} step" + "s" * (count > 1)


def _far(offset):
    north_south = {-1: "north", 0: "", 1: "south"}[int(np.sign(offset[0]))]
    west_east = {-1: "west", 0: "", 1: "east"}[int(np.sign(offset[1]))]
    compass = "-".join(word for word in (north_south, west_east) if word)
    return f"{_steps(distance(offset))} to your {compass}"


def _precise(offset):
    row, column = offset
    parts = []
    if row:
        parts.append(f"{_steps(abs(row))} {'north' if row < 0 else 'south'}")
    if column:
        parts.append(f"{_steps(abs(column))} {'west' if column < 0 else 'east'}")
    return " and ".join(parts)


def _balrog_text(state, lines, front):
    status = "Your status:\n" + "\n".join(
        f"- {vital}: {int(getattr(state, f'player_{vital}'))}/9"
        for vital in ("health", "food", "drink", "energy")
    )
    order = ["sapling", *(item for item in ITEMS if item != "sapling")]
    owned = [(item, int(getattr(state.inventory, item))) for item in order]
    owned = [f"- {item}: {count}" for item, count in owned if count]
    inventory = "You have nothing in your inventory."
    if owned:
        inventory = "Your inventory:\n" + "\n".join(owned)
    event = ""
    if state.is_sleeping:
        event = (
            "You are sleeping, and will not be able take actions until energy is full."
            "\n\n\n\n"
        )
    elif int(state.player_health) <= 0:
        event = "You died.\n\n\n\n"
    listing = "You see nothing away from you."
    if lines:
        listing = "You see:\n" + "\n".join(f"- {line}" for line in lines)
    observation = f"{event}{listing}\n\nYou face {front} at your front."
    return f"\n\nCurrent Observation:\n{status}\n\n{inventory}\n{observation}\n"
