"""Loops whose sums stay in the registers of AVX-512, for numba's kernels to call: LLVM's instructions, as it does not find them in plain loops.

A tile is up to `ROWS` rows times a block of `LANES` columns, the block's rows one after another: each that comes in is used for all
of the tile's. A sum goes over the inputs in their order, whatever else is in the tile: its bits do not depend on its company.
Arguments are addresses, and steps from one row to the next in bytes.
"""

from __future__ import annotations

import numba
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

LANES, ROWS = 64, 6
"""Columns of a block, in `PARTS` registers; rows of a tile: of 32 registers 24 hold sums, and four a row of the block."""
WIDTH, PARTS = 16, 4
TOGETHER = 4
"""Inputs that one integer instruction takes."""

_I8, _I16, _I32, _I64, _FLOAT = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
_FLOATS, _INTEGERS, _HALVES, _BYTES = (ir.VectorType(of, count) for of, count in ((_FLOAT, WIDTH), (_I32, WIDTH), (_I16, WIDTH), (_I8, WIDTH * TOGETHER)))


class _Floats:
    """Products of float32 numbers. loaded: what the block has; lanes: what is summed."""

    loaded, lanes = _FLOATS, _FLOATS

    @staticmethod
    def widened(builder, value):
        return value

    @staticmethod
    def add(builder, total, x, value):
        return builder.call(_function(builder, "llvm.fma.v16f32", _FLOATS, _FLOATS, _FLOATS, _FLOATS), [x, value, total])


class _Halves(_Floats):
    """The same with a block in bf16: a float32's upper half."""

    loaded = _HALVES

    @staticmethod
    def widened(builder, value):
        return builder.bitcast(builder.shl(builder.zext(value, _INTEGERS), ir.Constant(_INTEGERS, [16] * WIDTH)), _FLOATS)


class _Bytes(_Floats):
    """Products of unsigned rows and a signed block of 8 bits, `TOGETHER` to a lane, summed in 32: exact (AVX512_VNNI)."""

    loaded, lanes = _INTEGERS, _INTEGERS

    @staticmethod
    def add(builder, total, x, value):
        function = _function(builder, "llvm.x86.avx512.vpdpbusd.512", _INTEGERS, _INTEGERS, _BYTES, _BYTES)
        return builder.call(function, [total, builder.bitcast(x, _BYTES), builder.bitcast(value, _BYTES)])


def _function(builder, name, returned, *taken):
    """One of LLVM's own functions."""
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(returned, taken), name)


def _at(builder, address, step, row, of):
    """A pointer to a row."""
    return builder.inttoptr(builder.add(address, builder.mul(step, _I64(row) if isinstance(row, int) else row)), of.as_pointer())


def _load(builder, pointer, part=0):
    """The part-th element from there, which may lie anywhere."""
    value = builder.load(builder.gep(pointer, [_I64(part)]))
    value.align = 1
    return value


def _spread(builder, value, lanes):
    """A number in all of a register's lanes."""
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), ir.Constant(_INTEGERS, [0] * WIDTH))


def _tile(kind):
    """The intrinsic (block, block_step, x, x_step, y, y_step, inputs, rows): y [rows, LANES] = x [rows, inputs] times the block [inputs, LANES]."""
    @intrinsic
    def tile(typing, block, block_step, x, x_step, y, y_step, inputs, rows):
        def generate(context, builder, signature, arguments):
            *shared, rows = arguments
            done = builder.append_basic_block("done")
            choice = builder.switch(rows, done)
            for count in range(1, ROWS + 1):
                choice.add_case(_I64(count), _tile_of(builder, kind, count, done, *shared))
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


def _tile_of(builder, kind, rows, done, block, block_step, x, x_step, y, y_step, inputs):
    """The instructions of a tile of so many rows, which then go on at ``done``."""
    entry, loop, end = (builder.append_basic_block(name) for name in ("entry", "loop", "end"))
    builder.position_at_end(entry)
    row_at = [_at(builder, x, x_step, row, kind.lanes.element) for row in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_I64)
    sums = [[builder.phi(kind.lanes) for _ in range(PARTS)] for _ in range(rows)]
    at = _at(builder, block, block_step, i, kind.loaded)
    parts = [kind.widened(builder, _load(builder, at, part)) for part in range(PARTS)]
    added = []
    for row in range(rows):
        one = _spread(builder, _load(builder, builder.gep(row_at[row], [i])), kind.lanes)
        added.append([kind.add(builder, sums[row][part], one, parts[part]) for part in range(PARTS)])
    after = builder.add(i, _I64(1))
    i.add_incoming(_I64(0), entry)
    i.add_incoming(after, loop)
    for before, now in zip(sum(sums, []), sum(added, []), strict=True):
        before.add_incoming(ir.Constant(kind.lanes, [0] * WIDTH), entry)
        before.add_incoming(now, loop)
    builder.cbranch(builder.icmp_signed("<", after, inputs), loop, end)
    builder.position_at_end(end)
    for row in range(rows):
        out = _at(builder, y, y_step, row, kind.lanes)
        for part in range(PARTS):
            builder.store(added[row][part], builder.gep(out, [_I64(part)])).align = 1
    builder.branch(done)
    return entry


tile_of_floats, tile_of_halves, tile_of_bytes = _tile(_Floats), _tile(_Halves), _tile(_Bytes)


_FEATURES = binding.get_host_cpu_features() if numba.config.CPU_NAME is None and numba.config.CPU_FEATURES is None else {}
AVX512, VNNI = (bool(_FEATURES.get(feature)) and torch.backends.cpu.get_cpu_capability() == "AVX512" for feature in ("avx512f", "avx512vnni"))
