"""What we hook into the Hopper kernels of flash-attn-4: the relative bias, and the gradient of its vector.

The package calls one function on a tile of scores and one on a tile of dS. A warp owns 16 rows of a tile, whose
fragments repeat their distances: the elements (i, j, n) of a thread lie at d + i - 8j + 8n, or at d + 8j - 8n - i where
the tile is transposed. So 2 (N / 8 + 1) numbers serve all of them, and a strip of 16 rows beyond the reach of the bias
needs one. Auxiliary tensors: the table (heads, 2 (R + PADDING) + 1), and for the gradient Near and Far, which
reduction.py describes and adds up.
"""

import inspect

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from flash_attn.cute import utils
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

from fat5.ops.attention.hopper.launch_table import PADDING, STRIP


@cute.jit
def score(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    """The bias of one score, where scores are not scaled. The classes below see whole tiles and never call it, but the
    package keeps what it compiles by its hash; its Blackwell kernels do call it."""
    table = aux_tensors[0]
    reach = reach_of(table)
    distance = cutlass.min(cutlass.max(kv_idx[0] - q_idx[0], -reach), reach)
    return score + table[head[0], distance + reach + PADDING]


@cute.jit
def scaled_score(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    """The same where they are."""
    table = aux_tensors[0]
    reach = reach_of(table)
    distance = cutlass.min(cutlass.max(kv_idx[0] - q_idx[0], -reach), reach)
    return score + table[head[0], distance + reach + PADDING]


@cute.jit
def score_gradient(grad, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    """The bias is added, so dS is what it was."""
    return grad


@cute.jit
def reach_of(table):
    """R, from the table's width."""
    return (table.shape[1] - 1) // 2 - PADDING


@cute.jit
def is_far(lowest, highest, reach):
    """Whether all distances of a strip, lowest..highest, share one value."""
    return (highest <= -reach) | (lowest >= reach)


@cute.jit
def far_value(table, head, lowest, reach):
    return table[head, cutlass.min(cutlass.max(lowest, -reach), reach) + reach + PADDING]


@cute.jit
def add_near(tile, table, head, corner, reach, softmax_scale, transposed: cutlass.Constexpr):
    """tile * softmax_scale + bias, in place; `corner` is this thread's first distance."""
    groups = const_expr(cute.size(tile) // 4)
    bias = cute.make_rmem_tensor(2 * (groups + 1), Float32)
    for u in cutlass.range_constexpr(groups + 1):
        for i in cutlass.range_constexpr(2):
            step = const_expr(8 - 8 * u - i if transposed else 8 * u + i - 8)
            bias[2 * u + i] = table[head, corner + reach + PADDING + step]
    for n in cutlass.range_constexpr(groups):
        for j in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(2):
                e = const_expr(i + 2 * j + 4 * n)
                tile[e] = tile[e] * softmax_scale + bias[2 * (n - j + 1) + i]


@cute.jit
def add_bias(tile, table, head, corner, reach, lowest, highest, softmax_scale, transposed: cutlass.Constexpr):
    """tile * softmax_scale + bias, in place, of a strip with the distances lowest..highest."""
    if is_far(lowest, highest, reach):
        constant = far_value(table, head, lowest, reach)
        for e in cutlass.range_constexpr(cute.size(tile)):
            tile[e] = tile[e] * softmax_scale + constant
    else:
        add_near(tile, table, head, corner, reach, softmax_scale, transposed)


@cute.jit
def add_bias_or_shift(tile, row_max, shift, table, head, corner, reach, lowest, highest):
    """The same of scores that need no scale: a far strip stays as it is, and the running maxima, relative to its
    constant, move instead. `shift` is what they are relative to."""
    constant = Float32(0.0)
    if is_far(lowest, highest, reach):
        constant = far_value(table, head, lowest, reach)
    else:
        add_near(tile, table, head, corner, reach, Float32(1.0), False)
    move_maxima(row_max, shift, constant)


@cute.jit
def move_maxima(row_max, shift, constant):
    for r in cutlass.range_constexpr(cute.size(row_max)):
        row_max[r] = row_max[r] + (shift[0] - constant)
    shift[0] = constant


class BiasedForward(FlashAttentionForwardSm90):
    """The forward with a relative bias."""

    def first_half_block_overlap(self, *arguments, softmax, **named):
        """Where a tile of queries begins, its maxima are relative to nothing."""
        self._row_max = softmax.row_max
        self._shift = cute.make_rmem_tensor(1, Float32)
        self._shift.fill(0.0)
        return super().first_half_block_overlap(*arguments, softmax=softmax, **named)

    @cute.jit
    def apply_score_mod(
        self, thr_mma_qk, batch_idx, head_idx, m_block, acc_S, n_block, softmax_scale, seqlen,
        aux_data, fastdiv_mods=None,
    ):  # fmt: skip
        place = thr_mma_qk.partition_C(cute.make_identity_tensor((self.tile_m, self.tile_n)))
        first_row = cute.arch.make_warp_uniform(place[0][0] - cute.arch.lane_idx() // 4)
        origin = n_block * self.tile_n - m_block * self.tile_m
        table = aux_data.tensors[0]
        reach = reach_of(table)
        corner = origin + place[0][1] - place[0][0]
        lowest, highest = origin - first_row - (STRIP - 1), origin - first_row + self.tile_n - 1
        if const_expr(self.score_mod is score):
            add_bias_or_shift(
                acc_S, self._row_max, self._shift, table, head_idx, corner, reach, lowest, highest
            )  # fmt: skip
        else:
            add_bias(acc_S, table, head_idx, corner, reach, lowest, highest, softmax_scale, False)

    def last_half_block_overlap(self, *arguments, **named):
        """Where it ends, they are the maxima themselves again."""
        move_maxima(self._row_max, self._shift, Float32(0.0))
        return super().last_half_block_overlap(*arguments, **named)


class BiasedBackward(FlashAttentionBackwardSm90):
    """The backward with a relative bias that wants no gradient. Its tiles of scores are (keys, queries)."""

    @cute.jit
    def apply_score_mod(
        self, acc_S, thr_mma_SdP, batch_idx, head_idx, m_block, n_block, softmax_scale, seqlen_info,
        aux_data, fastdiv_mods=(None, None),
    ):  # fmt: skip
        assert self.SdP_swapAB
        place = thr_mma_SdP.partition_C(cute.make_identity_tensor((self.tile_n, self.tile_m)))
        first_row = cute.arch.make_warp_uniform(place[0][0] - cute.arch.lane_idx() // 4)
        origin = n_block * self.tile_n - m_block * self.tile_m
        table = aux_data.tensors[0]
        add_bias(
            acc_S, table, head_idx, origin + place[0][0] - place[0][1], reach_of(table),
            origin + first_row - self.tile_m + 1, origin + first_row + STRIP - 1, softmax_scale, True,
        )  # fmt: skip

    def apply_score_mod_bwd(self, *_arguments, **_named):
        """The bias is added, so dS is what it was."""


class LearningBackward(BiasedBackward):
    """The backward that also leaves the sums of dS by distance.

    Each thread adds up its elements of one distance as soon as dS is there (`fold`). Once the product for dV is under
    way, a strip within reach is aligned and reduced over its warp, 32 neighbouring distances at a time, and stored into
    its own place of `Near`; a strip beyond it is added to two numbers a thread, which reach `Far` once a block of keys.
    Nothing is written twice, so there are no atomics and every sum has one order.
    """

    def mma(self, *arguments, **named):
        """Makes the two far sums, zero, where the block of keys begins."""
        call = inspect.signature(FlashAttentionBackwardSm90.mma).bind(self, *arguments, **named)
        mask_class = call.arguments["AttentionMaskCls"]
        self._tensors = call.arguments["aux_data"].tensors

        def begin(seqlen):
            self._far = cute.make_rmem_tensor(2, Float32)
            self._far.fill(0.0)
            return mask_class(seqlen)

        call.arguments["AttentionMaskCls"] = begin
        return super().mma(*call.args[1:], **call.kwargs)

    def mma_one_m_block(self, *arguments, mma_pdo_fn, score_mod_bwd_fn, **named):
        """Reduces what `fold` left behind the product for dV."""

        def fold_now(grad_tensor, _scores, m_block):
            self._folded = fold(grad_tensor)
            self._reduce = lambda: score_mod_bwd_fn(self._folded, self._far, m_block=m_block)

        def product_then_reduce(*operands, **how):
            mma_pdo_fn(*operands, **how)
            self._reduce()

        return super().mma_one_m_block(*arguments, mma_pdo_fn=product_then_reduce, score_mod_bwd_fn=fold_now, **named)

    def apply_score_mod_bwd(
        self, folded, far, thr_mma_SdP, batch_idx, head_idx, m_block, n_block, softmax_scale, seqlen_info,
        aux_data, fastdiv_mods=(None, None),
    ):  # fmt: skip
        """`folded` of one tile into Near and the thread's far sums."""
        table, near, _ = aux_data.tensors
        warp, strip = self._strip(n_block, batch_idx, seqlen_info)
        corner = n_block * self.tile_n + 16 * warp - m_block * self.tile_m
        reduce_strip(folded, far, near, head_idx, strip, m_block % 2, corner, reach_of(table), self.tile_m)

    def epilogue_dKV(self, *arguments):  # noqa: N802, the name is theirs
        call = inspect.signature(FlashAttentionBackwardSm90.epilogue_dKV).bind(self, *arguments).arguments
        _, strip = self._strip(call["n_block"], call["batch_idx"], call["seqlen"])
        store_far(self._far, self._tensors[2], call["head_idx"], strip)
        return super().epilogue_dKV(*arguments)

    def _strip(self, n_block, batch_idx, seqlen):
        """This warp among those that multiply, and its strip of keys among all."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - 4
        strips = self.tile_n // STRIP
        if const_expr(seqlen.has_cu_seqlens_k):
            first = seqlen.padded_offset_k // STRIP
        else:
            first = batch_idx * cute.ceil_div(seqlen.seqlen_k, self.tile_n) * strips
        return warp, first + n_block * strips + warp


@cute.jit
def fold(tile):
    """2 (N / 8 + 1) sums over a thread's elements of one distance, d0 + 8 - 8u - i for [2u + i]."""
    groups = const_expr(cute.size(tile) // 4)
    sums = cute.make_rmem_tensor(2 * (groups + 1), Float32)
    for i in cutlass.range_constexpr(2):
        sums[i] = tile[i + 2]
        for u in cutlass.range_constexpr(1, groups):
            sums[2 * u + i] = tile[i + 4 * (u - 1)] + tile[i + 2 + 4 * u]
        sums[2 * groups + i] = tile[i + 4 * (groups - 1)]
    return sums


@cute.jit
def reduce_strip(sums, far, near, head, strip, slot, corner, reach, queries: cutlass.Constexpr):
    """Adds a strip of 16 keys by `queries` queries, its first key and query `corner` apart."""
    if corner + 15 <= -reach:
        far[0] = far[0] + total(sums)
    elif corner - (queries - 1) >= reach:
        far[1] = far[1] + total(sums)
    else:
        groups = const_expr(queries // 8)
        chunks = const_expr((groups + 5) // 4)
        lane = cute.arch.lane_idx()
        row = lane // 4
        column = lane % 4
        # After the shuffles every lane of one row holds the same distances, 8 apart.
        aligned = cute.make_rmem_tensor(4 * chunks, Float32)
        moved = cute.make_rmem_tensor(groups + 1, Float32)
        for i in cutlass.range_constexpr(2):
            shift = 2 * column + i
            source = ((row + shift) % 8) * 4 + column
            wraps = row + shift >= 8
            for u in cutlass.range_constexpr(groups + 1):
                moved[u] = utils.shuffle_sync(sums[2 * u + i], source)
            for u in cutlass.range_constexpr(4 * chunks):
                if const_expr(u <= groups + 1):
                    before = moved[u - 1] if const_expr(u >= 1) else Float32(0.0)
                    here = moved[u] if const_expr(u <= groups) else Float32(0.0)
                    value = before if wraps else here
                    aligned[u] = value if const_expr(i == 0) else aligned[u] + value
                else:
                    aligned[u] = Float32(0.0)
        upper = column >= 2
        odd = column % 2 == 1
        for chunk in cutlass.range_constexpr(chunks):
            halves = cute.make_rmem_tensor(2, Float32)
            for k in cutlass.range_constexpr(2):
                sent = aligned[4 * chunk + k] if upper else aligned[4 * chunk + 2 + k]
                kept = aligned[4 * chunk + 2 + k] if upper else aligned[4 * chunk + k]
                halves[k] = kept + cute.arch.shuffle_sync_bfly(sent, offset=2)
            sent = halves[0] if odd else halves[1]
            kept = halves[1] if odd else halves[0]
            value = kept + cute.arch.shuffle_sync_bfly(sent, offset=1)
            distance = corner + 8 - 32 * chunk - 8 * column + row
            if (distance > -reach) & (distance < reach):
                near[head, strip, slot, distance + reach] = value
            far[0] = far[0] + (value if distance <= -reach else Float32(0.0))
            far[1] = far[1] + (value if distance >= reach else Float32(0.0))


@cute.jit
def total(sums):
    """All of a thread's sums, in four chains."""
    chains = cute.make_rmem_tensor(4, Float32)
    for k in cutlass.range_constexpr(4):
        chains[k] = sums[k]
    for k in cutlass.range_constexpr(4, cute.size(sums)):
        chains[k % 4] = chains[k % 4] + sums[k]
    return (chains[0] + chains[1]) + (chains[2] + chains[3])


@cute.jit
def store_far(far, target, head, strip):
    """The warp's two far sums."""
    for side in cutlass.range_constexpr(2):
        value = far[side]
        for k in cutlass.range_constexpr(5):
            value = value + cute.arch.shuffle_sync_bfly(value, offset=1 << k)
        if cute.arch.lane_idx() == 0:
            target[head, strip, side] = value
