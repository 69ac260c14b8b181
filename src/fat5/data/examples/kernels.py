"""The compiled core of the room: counter-based noise, the order of pieces, span corruption, packing.

Everything jitted lives in this one file, because numba's cache watches only the file a function is written in: a kernel
that inlined another file's function would be served stale after that file changed.

Integers are int64 throughout, masked to 32 bits as the algorithms require (numba turns uint64 + int64 into float).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

MASK32 = 0xFFFFFFFF
BLOCK_DOCUMENTS = 64  # documents between two entries of the piece index: 1/8 byte a document
PIECE_BITS = 40  # a global piece id is source << PIECE_BITS | piece within the source
DOMAIN_SHIFT = 28  # the top bits of the last counter word tell the uses of the generator apart
TRAINING, VALIDATION, PERMUTATION, GROUPS, COLLATION = 0, 1, 2, 3, 4
FEISTEL_ROUNDS = 6


def jit(function: Callable[..., Any]) -> Any:
    """`numba.njit`, with its cache on disk if a cache folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available": read-only installation and home
        return numba.njit(nogil=True)(function)


@jit
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Philox4x32-10: four 32-bit words of a 128-bit counter and a 64-bit key → four random 32-bit words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0 = (k0 + 0x9E3779B9) & MASK32
        k1 = (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


@jit
def permute(index, size, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """Position `index` of a keyed permutation of range(size): an alternating Feistel network with cycle walking.

    O(1) memory and, since the domain is below twice `size` (above 64), fewer than two walks on average.
    """
    if size <= 1:
        return 0
    bits = 6
    while (1 << bits) < size:
        bits += 1
    half = bits >> 1
    low_bits = bits - half
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << half) - 1
    value = index
    while True:
        low = value & low_mask
        high = value >> low_bits
        for turn in range(FEISTEL_ROUNDS):
            key = w0 if turn % 4 == 0 else (w1 if turn % 4 == 1 else (w2 if turn % 4 == 2 else w3))
            source = low if turn % 2 == 0 else high
            mixed = (source + key + turn * 0x9E3779B9) & MASK32
            mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & MASK32
            mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & MASK32
            mixed ^= mixed >> 16
            if turn % 2 == 0:
                high ^= mixed & high_mask
            else:
                low ^= mixed & low_mask
        value = high << low_bits | low
        if value < size:
            return value


@jit
def compose(total, parts, out, marks, block, noise_key):  # type: ignore[no-untyped-def]
    """Writes a uniform random composition of `total` into `parts` positive lengths; returns the next counter block.

    It is a uniform choice of parts-1 cuts among total-1 places: by Floyd's algorithm (one word a cut; Bentley and
    Floyd, CACM 1987) if cuts are few, else by selection sampling (one word a place; Knuth 3.4.2 S). `marks` is
    uint8 scratch for `total` places, zero before and after; `noise_key` is as in `corrupt`.
    """
    c1, c2, c3, k0, k1 = noise_key
    cuts = parts - 1
    places = total - 1
    part = 0
    start = 0
    if cuts * 2 < places:
        drawn = places - cuts
        while drawn < places:
            w0, w1, w2, w3 = philox(block, c1, c2, c3, k0, k1)
            block += 1
            for word in (w0, w1, w2, w3):
                if drawn < places:
                    place = (word * (drawn + 1)) >> 32
                    marks[drawn if marks[place] else place] = 1
                    drawn += 1
        place = 0
        while part < cuts:
            if marks[place]:
                marks[place] = 0
                out[part] = place + 1 - start
                start = place + 1
                part += 1
            place += 1
    else:
        position = 1
        while cuts > 0:
            w0, w1, w2, w3 = philox(block, c1, c2, c3, k0, k1)
            block += 1
            for word in (w0, w1, w2, w3):
                if cuts > 0:
                    if ((word * places) >> 32) < cuts:
                        out[part] = position - start
                        start = position
                        part += 1
                        cuts -= 1
                    places -= 1
                    position += 1
    out[part] = total - start
    return block


@jit
def corrupt(tokens, noise, spans, anywhere, mode, sentinels, eos, scratch, noise_key, inputs, i, targets, t):  # type: ignore[no-untyped-def]
    """Writes one example at inputs[i:] and targets[t:]; returns the ends.

    Segments alternate from a non-noise one, so that a single span is always a suffix; with `anywhere` text may follow
    the last span, and none need precede the first.

    Args:
        mode: id of the mode token; below 0 for none.
        scratch: (2, spans + 1 or more) int64 for the segment lengths, and uint8 with a byte a token and one more, all
            zero.
        noise_key: last three words of the Philox counter, and both words of the key.
    """
    lengths, marks = scratch
    kept, masked = lengths[0], lengths[1]
    rest = tokens.size - noise
    if anywhere:
        block = compose(rest + 2, spans + 1, kept, marks, 1, noise_key)
        kept[0] -= 1
    else:
        block = compose(rest, spans, kept, marks, 1, noise_key)
    compose(noise, spans, masked, marks, block, noise_key)
    if mode >= 0:
        inputs[i] = mode
        i += 1
    position = 0
    for span in range(spans):
        for _ in range(kept[span]):
            inputs[i] = tokens[position]
            i += 1
            position += 1
        inputs[i] = sentinels[span]
        targets[t] = sentinels[span]
        i += 1
        t += 1
        for _ in range(masked[span]):
            targets[t] = tokens[position]
            t += 1
            position += 1
    while position < tokens.size:
        inputs[i] = tokens[position]
        i += 1
        position += 1
    inputs[i] = eos
    targets[t] = eos
    return i + 1, t + 1


@intrinsic
def _pointer(_context, address):  # type: ignore[no-untyped-def]
    """An address held in an int64, as a pointer."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


class StreamTables(NamedTuple):
    """Arrays for the kernels: where every piece of every source lies, and the tables of the mixture."""

    # sources (S,)
    pieces: np.ndarray  # int64: pieces of a source
    simple: np.ndarray  # bool: every document is exactly one piece
    index_first: np.ndarray  # int64 (S+1,): a source's slice of `blocks`
    blocks: np.ndarray  # int64: pieces before each block of BLOCK_DOCUMENTS documents
    shard_first: np.ndarray  # int64 (S+1,): a source's slice of the shard arrays
    # shards
    first_document: np.ndarray  # int64: documents of the source before this shard
    documents: np.ndarray  # int64
    ends_address: np.ndarray  # int64: uint64 document ends, in tokens
    tokens_address: np.ndarray  # int64; 0 until a shard is first read
    token_bytes: np.ndarray  # int64: 2 or 4
    # blending: one period of the interleaving of sources
    blend_source: np.ndarray  # int64
    blend_rank: np.ndarray  # int64: earlier draws of the same source in the period
    blend_count: np.ndarray  # int64 (S,): draws of a source in a period
    # mixture
    thresholds: np.ndarray  # int64 (D,): cumulative proportions in units of 2^-32
    noise: np.ndarray  # int32 (D, max_tokens+1)
    spans: np.ndarray  # int32 (D, max_tokens+1)
    anywhere: np.ndarray  # bool (D,): spans may lie anywhere
    mode: np.ndarray  # int64 (D,): id of the mode token or -1
    sentinels: np.ndarray  # int64
    eos: int
    max_tokens: int
    seed_low: int
    seed_high: int


class Examples(NamedTuple):
    """The examples at some stream positions: arrays of one length."""

    piece: np.ndarray  # int64: global piece id
    epoch: np.ndarray  # int64: the pass over its source
    denoiser: np.ndarray  # int64
    encoder: np.ndarray  # int64: encoder tokens
    decoder: np.ndarray  # int64: decoder tokens
    length: np.ndarray  # int64: raw tokens
    shard: np.ndarray  # int64: in the tables's shard arrays
    start: np.ndarray  # int64: first raw token in the shard

    def take(self, chosen: np.ndarray) -> "Examples":
        """Those at some indices."""
        return Examples(*(column[chosen] for column in self))


@jit
def pieces_of(length, max_tokens):  # type: ignore[no-untyped-def]
    """Number of pieces of a document; 0 if it is too short to corrupt."""
    return 0 if length < 2 else (length + max_tokens - 1) // max_tokens


@jit
def _last_not_above(values, low, high, key):  # type: ignore[no-untyped-def]
    """The largest i in [low, high) with values[i] <= key."""
    while high - low > 1:
        middle = (low + high) >> 1
        if values[middle] <= key:
            low = middle
        else:
            high = middle
    return low


@jit
def _extent(tables, shard, document):  # type: ignore[no-untyped-def]
    """Start and length of a document, in tokens of its shard."""
    ends = numba.carray(_pointer(tables.ends_address[shard]), (tables.documents[shard],), np.int64)
    start = ends[document - 1] if document > 0 else 0
    return start, ends[document] - start


@jit
def _locate(tables, source, piece):  # type: ignore[no-untyped-def]
    """(shard, first token in the shard, length) of a piece of a source."""
    low, high = tables.shard_first[source], tables.shard_first[source + 1]
    document = piece
    part = 0
    if not tables.simple[source]:
        first = tables.index_first[source]
        block = _last_not_above(tables.blocks, first, tables.index_first[source + 1], piece)
        part = piece - tables.blocks[block]
        document = (block - first) * BLOCK_DOCUMENTS
    shard = _last_not_above(tables.first_document, low, high, document)
    local = document - tables.first_document[shard]
    start, length = _extent(tables, shard, local)
    if not tables.simple[source]:
        count = pieces_of(length, tables.max_tokens)
        while part >= count:
            part -= count
            local += 1
            while local >= tables.documents[shard]:
                shard += 1
                local = 0
            start, length = _extent(tables, shard, local)
            count = pieces_of(length, tables.max_tokens)
    begin = part * tables.max_tokens
    end = min(begin + tables.max_tokens, length)
    # A last piece of one token could not be corrupted, so it takes one from the piece before it.
    if length - end == 1:
        end -= 1
    if length - begin == 1 and begin > 0:
        begin -= 1
    return shard, start + begin, end - begin


@jit
def resolve(tables, positions, out):  # type: ignore[no-untyped-def]
    """Fills `out` for positions of the endless stream of pieces."""
    k0, k1 = tables.seed_low, tables.seed_high
    sources = tables.pieces.size
    period = tables.blend_source.size
    key_source = -1
    key_epoch = -1
    w0 = w1 = w2 = w3 = 0
    for i in range(positions.size):
        position = positions[i]
        source = 0
        draw = position
        if sources > 1:
            turn = position % period
            source = tables.blend_source[turn]
            draw = position // period * tables.blend_count[source] + tables.blend_rank[turn]
        size = tables.pieces[source]
        epoch = draw // size
        if source != key_source or epoch != key_epoch:
            w0, w1, w2, w3 = philox(epoch & MASK32, source, 0, PERMUTATION << DOMAIN_SHIFT, k0, k1)
            key_source, key_epoch = source, epoch
        local = permute(draw - epoch * size, size, w0, w1, w2, w3)
        shard, start, length = _locate(tables, source, local)
        piece = source << PIECE_BITS | local
        set_example(tables, out, i, piece, epoch, _draw(tables.thresholds, k0, k1, piece, epoch), shard, start, length)


@jit
def _draw(thresholds, k0, k1, piece, epoch):  # type: ignore[no-untyped-def]
    """The denoiser of a piece in a pass. Not of `tables`: passing them costs as much as the draw."""
    word, _, _, _ = philox(0, piece & MASK32, piece >> 32, (TRAINING << DOMAIN_SHIFT) + epoch, k0, k1)
    denoiser = 0
    while word >= thresholds[denoiser]:
        denoiser += 1
    return denoiser


@jit
def resolve_documents(tables, pieces, epochs, ends, out):  # type: ignore[no-untyped-def]
    """Fills `out` for documents that end at `ends` in the only shard, drawn as pieces of the stream are."""
    start = 0
    for i in range(pieces.size):
        denoiser = _draw(tables.thresholds, tables.seed_low, tables.seed_high, pieces[i], epochs[i])
        set_example(tables, out, i, pieces[i], epochs[i], denoiser, 0, start, ends[i] - start)
        start = ends[i]


@jit
def resolve_fixed(tables, source, pieces, denoiser, out):  # type: ignore[no-untyped-def]
    """Fills `out` for given pieces of one source under a given denoiser (the validation stream)."""
    for i in range(pieces.size):
        shard, start, length = _locate(tables, source, pieces[i])
        set_example(tables, out, i, source << PIECE_BITS | pieces[i], denoiser, denoiser, shard, start, length)


@jit
def set_example(tables, out, i, piece, epoch, denoiser, shard, start, length):  # type: ignore[no-untyped-def]
    noise = tables.noise[denoiser, length]
    spans = tables.spans[denoiser, length]
    mode = 1 if tables.mode[denoiser] >= 0 else 0
    out.piece[i] = piece
    out.epoch[i] = epoch
    out.denoiser[i] = denoiser
    out.encoder[i] = mode + length - noise + spans + 1
    out.decoder[i] = noise + spans + 1
    out.length[i] = length
    out.shard[i] = shard
    out.start[i] = start


@jit
def write_examples(tables, examples, domain, inputs, targets, cu_inputs, cu_targets):  # type: ignore[no-untyped-def]
    """Corrupts `examples` one after another into flat `inputs` and `targets`; fills cu_seqlens, padded with the end."""
    scratch = np.empty((2, tables.sentinels.size + 1), np.int64), np.zeros(tables.max_tokens + 1, np.uint8)
    sentinels, eos = tables.sentinels, tables.eos
    i = 0
    t = 0
    cu_inputs[0] = 0
    cu_targets[0] = 0
    count = examples.piece.size
    for n in range(count):
        length = examples.length[n]
        denoiser = examples.denoiser[n]
        noise = tables.noise[denoiser, length]
        spans = tables.spans[denoiser, length]
        anywhere, mode = tables.anywhere[denoiser], tables.mode[denoiser]
        piece = examples.piece[n]
        word = (domain << DOMAIN_SHIFT) + examples.epoch[n]
        noise_key = piece & MASK32, piece >> 32, word, tables.seed_low, tables.seed_high
        width = tables.token_bytes[examples.shard[n]]
        address = tables.tokens_address[examples.shard[n]] + examples.start[n] * width
        if width == 2:
            short = numba.carray(_pointer(address), (length,), np.uint16)
            i, t = corrupt(
                short, noise, spans, anywhere, mode, sentinels, eos, scratch, noise_key, inputs, i, targets, t
            )
        else:
            wide = numba.carray(_pointer(address), (length,), np.uint32)
            i, t = corrupt(
                wide, noise, spans, anywhere, mode, sentinels, eos, scratch, noise_key, inputs, i, targets, t
            )
        cu_inputs[n + 1] = i
        cu_targets[n + 1] = t
    cu_inputs[count + 1 :] = i
    cu_targets[count + 1 :] = t
    return i, t
