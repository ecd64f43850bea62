"""The position tables that the published video checkpoints hold, one number after the other."""

import math

import numpy as np


def line_table(positions, width):
    """(1, n, width): [sin, cos] of every position."""
    table = [
        [
            wave(position / 10000 ** (i / (width // 2)))
            for wave in (math.sin, math.cos)
            for i in range(width // 2)
        ]
        for position in positions
    ]
    return np.array(table, np.float32)[None]


def frame_table(rows, columns, width):
    """(1, rows * columns, width): half for the column, half for the row."""
    y, x = (line_table(positions, width // 2)[0] for positions in (rows, columns))
    table = [np.concatenate([x[j], y[i]]) for i in range(len(rows)) for j in range(len(columns))]
    return np.array(table)[None]


def latte_tables(config):
    """Of a class-conditional Latte."""
    grid, width = range(config.sample_size // config.patch_size), config.hidden_size
    return {
        "pos_embed": frame_table(grid, grid, width),
        "temp_embed": line_table(range(config.num_frames), width),
    }


def stdit_tables(config):
    """Of an STDiT."""
    frames, rows, columns = (
        range(n // p) for n, p in zip(config.input_size, config.patch_size, strict=True)
    )
    rows, columns = ([i / config.space_scale for i in axis] for axis in (rows, columns))
    return {
        "pos_embed": frame_table(rows, columns, config.hidden_size),
        "pos_embed_temporal": line_table(
            [i / config.time_scale for i in frames], config.hidden_size
        ),
    }


def stdit3_tables(config):
    """Of an STDiT3: the rotary frequencies."""
    dim = config.hidden_size // config.num_heads
    return {"rope.freqs": np.array([10000 ** (-2 * i / dim) for i in range(dim // 2)], np.float32)}
