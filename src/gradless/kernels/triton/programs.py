"""The Triton kernels: `reference`'s functions on a GPU, with the noise drawn where it is used, to the same bits.

Every number that changes from step to step (a direction's words, a coefficient) is a plain argument, never a constant, so
that nothing is compiled twice. Launch them without contraction of products and sums (`enable_fp_fusion=False`).

Over 400 lines, because the programs share their inlined functions.
"""
# mypy: ignore-errors
# (The language in which programs are written is Triton's, and only looks like Python.)

import triton
import triton.language as tl

RADEMACHER, INTEGERS, ROUNDED = (tl.constexpr(i) for i in range(1, 4))
OFFSET, BOTH, CODE = (tl.constexpr(i) for i in range(2, 5))
NEW_EVERY_STEP = ["key_low", "key_high", "step", "query", "second", "rounding", "m", "eps", "coefficient_0", "coefficient_1"]
NEW_EVERY_STEP += ["decay_0", "decay_1", "weight", "n"]


@triton.jit
def word(key_low, key_high, step, query, index):
    """Random word `index`, int64, of noise.py's sequence: uint32."""
    block, lane = index // 64 * 16 + index % 16, index % 64 // 16
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + step.to(tl.uint32), tl.zeros_like(c0) + query.to(tl.uint32)
    k0, k1 = tl.zeros_like(c0) + key_low.to(tl.uint32), tl.zeros_like(c0) + key_high.to(tl.uint32)
    m0, m1 = tl.full(c0.shape, 0xD2511F53, tl.uint32), tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high_0, low_0, high_1, low_1 = tl.umulhi(c0, m0), c0 * m0, tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + tl.full(c0.shape, 0x9E3779B9, tl.uint32), k1 + tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    return tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))


@triton.jit
def stochastic_round(x, random):
    whole = tl.floor(x)
    return whole + ((random >> 8).to(tl.float32) * 5.9604644775390625e-08 < x - whole).to(tl.float32)


@triton.jit
def rounded(x, kind: tl.constexpr):
    """fp32 to nearest even as another type of floats."""
    y = x.to(kind)
    if kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return y


@triton.jit
def half(key_low, key_high, step, query, index):
    """Random 16-bit integer `index`, int64: int32."""
    place = index % 128
    both = word(key_low, key_high, step, query, index // 128 * 64 + place % 64)
    return tl.where(place < 64, both & 0xFFFF, both >> 16).to(tl.int32)


@triton.jit
def coordinate(
    index, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr
):
    """u at elements `index`, int64, of a tensor: fp32."""
    index = index // SPAN
    if DISTRIBUTION == RADEMACHER:
        bits = word(key_low, key_high, step, query, index // 32)
        u = ((bits >> (index % 32).to(tl.uint32)) & 1).to(tl.float32) * 2 - 1
    else:
        random = half(key_low, key_high, step, query, index)
        if DISTRIBUTION == INTEGERS:
            drawn = tl.zeros_like(random) - m
            for k in range(2 * m):
                drawn += (random >= tl.load(edges + k)).to(tl.int32)
            u = drawn.to(tl.float32)
        else:
            u = tl.load(normal + (random & 0x7FFF))
            u = tl.where(random >= 0x8000, -u, u)
            if DISTRIBUTION == ROUNDED:
                u = stochastic_round(u * eps, word(key_low, key_high, step, second, index))
    return u


@triton.jit
def signs(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def value_of(block, blocks, BLOCKS_PER_VALUE: tl.constexpr):
    """The tuned value that each block reads: int64."""
    value = block
    if BLOCKS_PER_VALUE > 1:
        value = block // blocks * ((blocks + BLOCKS_PER_VALUE - 1) // BLOCKS_PER_VALUE) + block % blocks // BLOCKS_PER_VALUE
    return value


@triton.jit
def scale_of(packed, block, here, NBYTES: tl.constexpr, AT: tl.constexpr, WIDE: tl.constexpr):
    """The scale d at byte AT of blocks (fp32 if WIDE, else fp16): fp32."""
    if WIDE:
        scale = tl.load((packed + block * NBYTES + AT).to(tl.pointer_type(tl.float32)), mask=here, other=0)
    else:
        scale = field(packed, block, here, NBYTES, AT)
    return scale


@triton.jit
def field(packed, block, here, NBYTES: tl.constexpr, AT: tl.constexpr):
    """The fp16 field at byte AT of blocks: fp32."""
    at = packed + block * NBYTES + AT
    low = tl.load(at, mask=here, other=0).to(tl.uint16)
    high = tl.load(at + 1, mask=here, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def moved(x, z, base, unit, coefficient, decay, KEEPS_SIGN: tl.constexpr):
    """decay * x + (coefficient * z) * unit, stopped at zero if a scale keeps its sign."""
    y = x * decay + (z * coefficient) * unit
    if KEEPS_SIGN:
        y = tl.where(base > 0, tl.maximum(y, 0), tl.where(base < 0, tl.minimum(y, 0), 0.0))
    return y


@triton.jit
def base_and_unit(
    packed, block, here, unit_of_offset, NBYTES: tl.constexpr, SCALE_AT: tl.constexpr, OFFSET_AT: tl.constexpr,
    PART: tl.constexpr, RELATIVE: tl.constexpr, KEEPS_SIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The file's value of the tuned field of each block, and the unit of its moves."""
    d = scale_of(packed, block, here, NBYTES, SCALE_AT, WIDE)
    base, unit = d, tl.abs(d)
    if PART == OFFSET:
        base = field(packed, block, here, NBYTES, OFFSET_AT)
        unit = tl.abs(base) if KEEPS_SIGN else unit * unit_of_offset
    if not RELATIVE:
        unit = tl.zeros_like(base) + 1
    return base, unit


@triton.jit
def codes_of(packed, block, i, here, pieces, zero, NBYTES: tl.constexpr, SIZE: tl.constexpr):
    """Codes i of blocks, (P,) and (N,) -> int32 (P, N): see blocks.Pieces."""
    raw = tl.zeros((block.shape[0], i.shape[0]), tl.int32)
    for piece in tl.static_range(2):
        at = pieces + piece * SIZE + i
        byte, low, code_low, width = tl.load(at), tl.load(at + 2 * SIZE), tl.load(at + 4 * SIZE), tl.load(at + 6 * SIZE)
        held = tl.load(packed + (block * NBYTES)[:, None] + byte[None, :], mask=here[:, None], other=0).to(tl.int32)
        raw += ((held >> low[None, :]) & ((1 << width) - 1)[None, :]) << code_low[None, :]
    return ((raw + zero + 128) & 255) - 128


@triton.jit
def read(
    packed, tuned, block, value, blocks, here, z, coefficient, decay, unit_of_offset, NBYTES: tl.constexpr,
    SCALE_AT: tl.constexpr, OFFSET_AT: tl.constexpr, PART: tl.constexpr, RELATIVE: tl.constexpr, KEEPS_SIGN: tl.constexpr,
    BLOCKS_PER_VALUE: tl.constexpr, WIDE: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Scale and offset of each block under a view; z: the view's coordinate of each block's tuned value."""
    scale = scale_of(packed, block, here, NBYTES, SCALE_AT, WIDE)
    offset = tl.zeros_like(scale)
    if OFFSET_AT >= 0:
        offset = field(packed, block, here, NBYTES, OFFSET_AT)
    if PART > 0 and PART != CODE:
        x = tl.load(tuned + value, mask=here, other=0)
        if MOVED:
            first = block
            if BLOCKS_PER_VALUE > 1:
                first = block - block % blocks % BLOCKS_PER_VALUE
            base, unit = base_and_unit(
                packed, first, here, unit_of_offset, NBYTES, SCALE_AT, OFFSET_AT, PART, RELATIVE, KEEPS_SIGN, WIDE
            )
            x = moved(x, z, base, unit, coefficient, decay, KEEPS_SIGN)
        if PART == OFFSET:
            offset = x
        else:
            if PART == BOTH:
                offset = offset * tl.where(scale == 0, 1.0, tl.div_rn(x, tl.where(scale == 0, 1.0, scale)))
            scale = x
    if OFFSET_AT == SCALE_AT:
        offset = scale
    return scale, offset


@triton.jit
def weights_of(
    level, scale, offset, block, i, here, multiplier, offset_multiplier, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    SCALE_AT: tl.constexpr, OFFSET_AT: tl.constexpr,
):  # fmt: skip
    """(scale * multiplier) * level + offset * offset_multiplier of codes i: fp32 (P, N)."""
    s = tl.broadcast_to(scale[:, None], level.shape)
    o = tl.broadcast_to(offset[:, None], level.shape)
    if GROUPS > 1 or OFFSET_AT == SCALE_AT:
        group = (block * GROUPS)[:, None] + (i // (SIZE // GROUPS))[None, :]
        if GROUPS > 1:
            s = s * tl.load(multiplier + group, mask=here[:, None], other=0).to(tl.float32)
        if OFFSET_AT >= 0:
            o = o * tl.load(offset_multiplier + group, mask=here[:, None], other=0).to(tl.float32)
    w = s * level
    if OFFSET_AT >= 0:
        w = w + o
    return w


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def dequantize(
    packed, tuned, multiplier, offset_multiplier, rows, out, levels, pieces, unit_of_offset,
    key_low, key_high, step, query, second, normal, edges, m, eps, coefficient_0, decay_0, coefficient_1, decay_1,
    n, blocks, zero, lowest, highest, stride,
    DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr, NBYTES: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    SCALE_AT: tl.constexpr, OFFSET_AT: tl.constexpr, PART: tl.constexpr, RELATIVE: tl.constexpr, KEEPS_SIGN: tl.constexpr,
    BLOCKS_PER_VALUE: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr, VIEWS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """P blocks of one row under each view; out: (views, n, blocks * SIZE)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    k = tl.program_id(1) * P + tl.arange(0, P)
    here, block = k < blocks, row * blocks + k
    value = value_of(block, blocks, BLOCKS_PER_VALUE)
    code = codes_of(packed, block, tl.arange(0, SIZE), here, pieces, zero, NBYTES, SIZE)
    element = (block * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    z, step_of_code = tl.zeros((P,), tl.float32), tl.zeros((P, SIZE), tl.float32)
    if VIEWS > 0 and PART == CODE and row % stride == 0:
        step_of_code = coordinate(element, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
    if VIEWS > 0 and PART > 0 and PART != CODE:
        z = coordinate(value, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
    for view in tl.static_range(max(1, VIEWS)):
        coefficient, decay = coefficient_0, decay_0
        if view == 1:
            coefficient, decay = coefficient_1, decay_1
        scale, offset = read(
            packed, tuned, block, value, blocks, here, z, coefficient, decay, unit_of_offset,
            NBYTES, SCALE_AT, OFFSET_AT, PART, RELATIVE, KEEPS_SIGN, BLOCKS_PER_VALUE, WIDE, VIEWS > 0,
        )  # fmt: skip
        level = code.to(tl.float32) + step_of_code * coefficient
        if LEVELS or CLAMP:
            level = tl.where(LEVELS or row % stride == 0, tl.minimum(tl.maximum(level, lowest), highest), level)
        if LEVELS:
            level = tl.load(levels + (level - lowest).to(tl.int32))
        i_of = tl.arange(0, SIZE)
        w = weights_of(
            level, scale, offset, block, i_of, here, multiplier, offset_multiplier, SIZE, GROUPS, SCALE_AT, OFFSET_AT
        )
        at = ((view * n + i) * blocks + k) * SIZE
        tl.store(out + at[:, None] + tl.arange(0, SIZE)[None, :], rounded(w, out.dtype.element_ty), mask=here[:, None])


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def linear(
    x, packed, tuned, multiplier, offset_multiplier, rows, out, levels, pieces, unit_of_offset,
    key_low, key_high, step, query, second, normal, edges, m, eps, coefficient_0, decay_0, coefficient_1, decay_1,
    tokens, n, blocks, zero, lowest, highest,
    DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr, NBYTES: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    SCALE_AT: tl.constexpr, OFFSET_AT: tl.constexpr, PART: tl.constexpr, RELATIVE: tl.constexpr, KEEPS_SIGN: tl.constexpr,
    BLOCKS_PER_VALUE: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, VIEWS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """x @ W.T for ROWS of a weight whose codes stay as they are and TOKENS of each view; x: (views, tokens, blocks * SIZE)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    here, there = i < n, t < tokens
    row = tl.load(rows + i, mask=here, other=0)
    first, second_view = tl.zeros((TOKENS, ROWS), tl.float32), tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(blocks):
        block, z = row * blocks + k, tl.zeros((ROWS,), tl.float32)
        value = value_of(block, blocks, BLOCKS_PER_VALUE)
        if VIEWS > 0 and PART > 0:
            z = coordinate(value, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
        scale, offset = read(
            packed, tuned, block, value, blocks, here, z, coefficient_0, decay_0, unit_of_offset,
            NBYTES, SCALE_AT, OFFSET_AT, PART, RELATIVE, KEEPS_SIGN, BLOCKS_PER_VALUE, WIDE, VIEWS > 0,
        )  # fmt: skip
        scale_1, offset_1 = scale, offset
        if VIEWS > 1:
            scale_1, offset_1 = read(
                packed, tuned, block, value, blocks, here, z, coefficient_1, decay_1, unit_of_offset,
                NBYTES, SCALE_AT, OFFSET_AT, PART, RELATIVE, KEEPS_SIGN, BLOCKS_PER_VALUE, WIDE, VIEWS > 0,
            )  # fmt: skip
        for part in range(SIZE // K):
            column = part * K + tl.arange(0, K)
            level = codes_of(packed, block, column, here, pieces, zero, NBYTES, SIZE).to(tl.float32)
            if LEVELS:
                level = tl.load(levels + (tl.minimum(tl.maximum(level, lowest), highest) - lowest).to(tl.int32))
            w = weights_of(
                level, scale, offset, block, column, here, multiplier, offset_multiplier, SIZE, GROUPS, SCALE_AT, OFFSET_AT
            )
            at = x + ((t.to(tl.int64) * blocks + k) * SIZE)[:, None] + column[None, :]
            inputs = tl.load(at, mask=there[:, None], other=0.0)
            first += tl.dot(inputs, tl.trans(rounded(w, inputs.dtype)))
            if VIEWS > 1:
                w = weights_of(
                    level,
                    scale_1,
                    offset_1,
                    block,
                    column,
                    here,
                    multiplier,
                    offset_multiplier,
                    SIZE,
                    GROUPS,
                    SCALE_AT,
                    OFFSET_AT,
                )
                inputs = tl.load(at + tokens.to(tl.int64) * blocks * SIZE, mask=there[:, None], other=0.0)
                second_view += tl.dot(inputs, tl.trans(rounded(w, inputs.dtype)))
    for view in tl.static_range(max(1, VIEWS)):
        y = first if view == 0 else second_view
        at = (view * tokens + t).to(tl.int64)[:, None] * n + i[None, :]
        tl.store(out + at, rounded(y, out.dtype.element_ty), mask=there[:, None] & here[None, :])


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def linear_int8(
    x, s, packed, tuned, multiplier, offset_multiplier, rows, out, pieces, unit_of_offset,
    key_low, key_high, step, query, second, normal, edges, m, eps, coefficient_0, decay_0, coefficient_1, decay_1,
    tokens, n, blocks, zero, lowest, highest, stride,
    DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr, NBYTES: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    SCALE_AT: tl.constexpr, OFFSET_AT: tl.constexpr, PART: tl.constexpr, RELATIVE: tl.constexpr, KEEPS_SIGN: tl.constexpr,
    BLOCKS_PER_VALUE: tl.constexpr, WIDE: tl.constexpr, CLAMP: tl.constexpr, VIEWS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """reference.linear_int8 for ROWS and TOKENS of one view; x: int8 (views, tokens, blocks * SIZE), s: fp32 (views, tokens).

    A group is multiplied K codes at a time: the least that the hardware takes, those of other groups being zero.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    view = tl.program_id(2)
    coefficient, decay = coefficient_0, decay_0
    if view == 1:
        coefficient, decay = coefficient_1, decay_1
    here, there, token = i < n, t < tokens, (view * tokens + t).to(tl.int64)
    row = tl.load(rows + i, mask=here, other=0)
    y = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in range(blocks):
        block, z = row * blocks + k, tl.zeros((ROWS,), tl.float32)
        value = value_of(block, blocks, BLOCKS_PER_VALUE)
        if VIEWS > 0 and PART > 0 and PART != CODE:
            z = coordinate(value, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
        scale, offset = read(
            packed, tuned, block, value, blocks, here, z, coefficient, decay, unit_of_offset,
            NBYTES, SCALE_AT, OFFSET_AT, PART, RELATIVE, KEEPS_SIGN, BLOCKS_PER_VALUE, WIDE, VIEWS > 0,
        )  # fmt: skip
        for group in range(GROUPS):
            first = group * (SIZE // GROUPS) // K * K
            column = first + tl.arange(0, K)
            inside = column // (SIZE // GROUPS) == group
            code = codes_of(packed, block, column, here, pieces, zero, NBYTES, SIZE)
            at = (token * blocks + k) * SIZE
            inputs = tl.load(x + at[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0)
            if VIEWS > 0 and PART == CODE:
                element = (block * SIZE)[:, None] + column[None, :]
                u = coordinate(element, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
                after = code.to(tl.float32) + u * coefficient
                if CLAMP:
                    after = tl.minimum(tl.maximum(after, lowest), highest)
                code = tl.where((row % stride == 0)[:, None], after.to(tl.int32), code)
            low = ((code + 128) & 255) - 128
            acc = tl.dot(inputs, tl.trans(low.to(tl.int8)))
            if VIEWS > 0 and PART == CODE:
                acc += tl.dot(inputs, tl.trans(((code - low) >> 8).to(tl.int8))) * 256
            by, by_offset, at_group = scale, offset, block * GROUPS + group
            if GROUPS > 1:
                by = by * tl.load(multiplier + at_group, mask=here, other=0).to(tl.float32)
            if OFFSET_AT == SCALE_AT or (GROUPS > 1 and OFFSET_AT >= 0):
                by_offset = by_offset * tl.load(offset_multiplier + at_group, mask=here, other=0).to(tl.float32)
            y = tl.fma(tl.broadcast_to(by[None, :], y.shape), acc.to(tl.float32), y)
            if OFFSET_AT >= 0:
                total = tl.sum(inputs.to(tl.int32), axis=1).to(tl.float32)
                y = tl.fma(tl.broadcast_to(by_offset[None, :], y.shape), tl.broadcast_to(total[:, None], y.shape), y)
    y = y * tl.load(s + token, mask=there, other=0)[:, None]
    tl.store(out + token[:, None] * n + i[None, :], rounded(y, out.dtype.element_ty), mask=there[:, None] & here[None, :])


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def coordinates(
    out, key_low, key_high, step, query, second, normal, edges, m, eps, n,
    DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    u = coordinate(index, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
    tl.store(out + index, u, mask=index < n)


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def move_blocks(
    packed, tuned, unit_of_offset, key_low, key_high, step, query, second, normal, edges, m, eps, coefficient_0,
    decay_0, n, blocks,
    DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr, NBYTES: tl.constexpr, SCALE_AT: tl.constexpr, OFFSET_AT: tl.constexpr,
    PART: tl.constexpr, RELATIVE: tl.constexpr, KEEPS_SIGN: tl.constexpr,
    BLOCKS_PER_VALUE: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    value = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    here, block = value < n, value
    if BLOCKS_PER_VALUE > 1:
        values = (blocks + BLOCKS_PER_VALUE - 1) // BLOCKS_PER_VALUE
        block = value // values * blocks + value % values * BLOCKS_PER_VALUE
    z = coordinate(value, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
    base, unit = base_and_unit(
        packed, block, here, unit_of_offset, NBYTES, SCALE_AT, OFFSET_AT, PART, RELATIVE, KEEPS_SIGN, WIDE
    )
    x = tl.load(tuned + value, mask=here, other=0)
    tl.store(tuned + value, moved(x, z, base, unit, coefficient_0, decay_0, KEEPS_SIGN), mask=here)


@triton.jit
def whole_step(u, coefficient, index, key_low, key_high, step, rounding, residual, at, here, RESIDUAL: tl.constexpr):
    """reference.whole_steps for coordinates u of elements `index`, whose residuals lie at `at`."""
    random = word(key_low, key_high, step, rounding, index)
    if RESIDUAL:
        owed = tl.load(residual + at, mask=here, other=0).to(tl.float32) + stochastic_round(u * (coefficient * 256), random)
        whole = tl.floor(owed * 0.00390625 + 0.5)
        tl.store(residual + at, (owed - whole * 256).to(tl.int8), mask=here)
    else:
        whole = stochastic_round(u * coefficient, random)
    return whole


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def whole_steps(out, u, residual, key_low, key_high, step, rounding, coefficient_0, n, RESIDUAL: tl.constexpr, P: tl.constexpr):
    """out: the whole steps by which an update of coefficient * u moves each of n codes."""
    index = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    here = index < n
    z = tl.load(u + index, mask=here, other=0)
    whole = whole_step(z, coefficient_0, index, key_low, key_high, step, rounding, residual, index, here, RESIDUAL)
    tl.store(out + index, whole, mask=here)


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def move_codes(
    packed, u, residual, count, pieces, key_low, key_high, step, query, second, rounding, normal, edges, m, eps, coefficient_0,
    weight, blocks, zero, lowest, highest, stride,
    DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr, GIVEN: tl.constexpr, SIGNS: tl.constexpr, RESIDUAL: tl.constexpr,
    NBYTES: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """P blocks of one tuned row. Codes change by flipping bits of 32-bit words, because several codes may share a byte.

    u: the coordinates of the whole weight if GIVEN, else they are drawn. If SIGNS, an update takes the signs of weight * u.
    """
    tuned = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * P + tl.arange(0, P)
    i = tl.arange(0, SIZE)
    block, here = tuned * stride * blocks + k, (k < blocks)[:, None] & (i >= 0)[None, :]
    element = (block * SIZE)[:, None] + i[None, :]
    if GIVEN:
        z = tl.load(u + element, mask=here, other=0)
    else:
        z = coordinate(element, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
        z = signs(z * weight) if SIGNS else z
    at = ((tuned * blocks + k) * SIZE)[:, None] + i[None, :]
    whole = whole_step(z, coefficient_0, element, key_low, key_high, step, rounding, residual, at, here, RESIDUAL)
    code = codes_of(packed, block, i, k < blocks, pieces, zero, NBYTES, SIZE)
    after = tl.minimum(tl.maximum(code.to(tl.float32) + whole, lowest), highest).to(tl.int32)
    changes = here & (whole != 0) & (after != code)
    flipped = (code - zero) ^ (after - zero)
    for piece in tl.static_range(2):
        table = pieces + piece * SIZE + i
        byte, low, code_low, width = (
            tl.load(table),
            tl.load(table + 2 * SIZE),
            tl.load(table + 4 * SIZE),
            tl.load(table + 6 * SIZE),
        )
        bits = ((flipped >> code_low[None, :]) & ((1 << width) - 1)[None, :]) << low[None, :]
        place = (block * NBYTES)[:, None] + byte[None, :]
        shift = (place % 4).to(tl.int32) * 8
        words = (packed + (place - place % 4)).to(tl.pointer_type(tl.int32))
        tl.atomic_xor(words, bits << shift, mask=changes & (bits != 0))
    tl.atomic_add(count, tl.sum(changes.to(tl.int32)))


@triton.jit(do_not_specialize=NEW_EVERY_STEP)
def moved_values(
    values, u, out, key_low, key_high, step, query, second, rounding, normal, edges, m, eps, coefficient_0, decay_0, weight, n,
    DISTRIBUTION: tl.constexpr, SPAN: tl.constexpr, GIVEN: tl.constexpr, SIGNS: tl.constexpr, STOCHASTIC: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """decay * x + coefficient * u of a plain tensor; STOCHASTIC: rounded to bf16 without bias."""
    index = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    here = index < n
    if GIVEN:
        z = tl.load(u + index, mask=here, other=0)
    else:
        z = coordinate(index, key_low, key_high, step, query, second, normal, edges, m, eps, DISTRIBUTION, SPAN)
        z = signs(z * weight) if SIGNS else z
    y = tl.load(values + index, mask=here, other=0.0).to(tl.float32) * decay_0 + z * coefficient_0
    if STOCHASTIC:
        random = half(key_low, key_high, step, rounding, index)
        y = ((y.to(tl.int32, bitcast=True) + random) & -0x10000).to(tl.float32, bitcast=True)
    tl.store(out + index, rounded(y, out.dtype.element_ty), mask=here)
