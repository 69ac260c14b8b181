"""Our own decoding loop: greedy, sampling and beam search with the tokens of stock `generate`, in a fraction of its
time (figures in docs/generate.md, the step in step.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from fat5.generate.replay import SharedStep, bucket
from fat5.generate.settings import left_to_stock, processors, settings
from fat5.generate.step import DecoderWeights, Step

# On a GPU, the loop checks for the end of every row this often, since each check makes the host wait.
STEPS_BETWEEN_CHECKS = 8
# Below the score of any sequence; stock beam search uses it for minus infinity.
HOPELESS = -1.0e9


class Decoder:
    """A model ready to decode: a copy of its decoder's weights, laid out for few rows.

    Args:
        model: a `FAT5ForConditionalGeneration`, or a T5, mT5 or umT5 of transformers with a language-model head, in
            evaluation mode. Make a new loop after its weights change. On the CPU in float32 the decoder's weights are
            held twice.

    Raises:
        TypeError: another model, offloaded weights, or hooks on the decoder, which the loop would skip.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._weights: dict[torch.dtype | None, DecoderWeights] = {None: DecoderWeights(model)}
        self._shared: tuple[Any, SharedStep] | None = None
        self._replays = True

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        generator: torch.Generator | None = None,
        cuda_graph: bool = False,
        **how: Any,
    ) -> Tensor:
        """Writes up to `max_new_tokens` tokens for each prompt; the tokens are stock `generate`'s, ties aside.

        Args:
            input_ids: (B, L) int64. attention_mask: (B, L), non-zero = a token.
            generator: of the draws; the global one where None.
            cuda_graph: on CUDA, replay each step as a graph, recorded once for batches of a shape (replay.py). Give
                the largest batch first.
            how: fields of `GenerationConfig` (`num_beams`, `do_sample`, `top_p`, …). The model's `generation_config`
                supplies the others; docs/generate.md says which fields have an effect.

        Returns:
            (B, 1 + n) int64: the start token, then n <= max_new_tokens tokens; padding after an end.

        Raises:
            ValueError: a field that only stock `generate` obeys, or a value out of range.
        """
        config = settings(self.model, how)
        beyond = left_to_stock(config)
        if beyond:
            raise ValueError(f"{', '.join(beyond)}: our decoding loop does not obey this, stock generate does")
        beams, sample = 1 if config.num_beams is None else config.num_beams, bool(config.do_sample)
        if max_new_tokens < 1 or beams < 1:
            raise ValueError(f"max_new_tokens, num_beams: expected at least 1, got {max_new_tokens} and {beams}")
        if cuda_graph and not input_ids.is_cuda:
            raise ValueError(f"cuda_graph: expected input_ids on CUDA, they are on {input_ids.device}")
        ends = config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = config.pad_token_id
        pad = (ends[0] if ends else 0) if pad is None else pad
        starts = (config.decoder_start_token_id, config.bos_token_id, self.model.config.decoder_start_token_id, pad)
        start = next(token for token in starts if token is not None)
        memory = self.model.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        step = self._step(memory, attention_mask, max_new_tokens, beams, shared=cuda_graph)
        first = torch.full((len(input_ids),), start, device=input_ids.device)
        stop = torch.tensor(ends, device=input_ids.device, dtype=torch.long)
        chosen = processors(self.model, config, max_new_tokens, input_ids, stop)
        if beams > 1:
            return _beam_search(step, step.reorder, first, max_new_tokens, beams, chosen, stop, pad)
        if step.fused is not None and not (sample or chosen):
            return _greedy(step, first, max_new_tokens, stop, pad)
        return _one_by_one(step, first, max_new_tokens, sample, chosen, stop, pad, generator)

    def _step(self, memory: Tensor, mask: Tensor | None, capacity: int, beams: int, *, shared: bool) -> Step:
        """A new step, or that of the batch before if it is to be shared and fits."""
        if self._shared is not None and self._shared[1].failed:
            self._shared, self._replays = None, False
        device = memory.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype not in self._weights:
            self._weights[dtype] = DecoderWeights(self.model, dtype)
        weights = self._weights[dtype]
        if shared and self._replays:
            shape = bucket(memory.shape[1]), capacity, beams, memory.dtype, dtype
            try:
                if self._shared is None or self._shared[0] != shape or self._shared[1].items < len(memory):
                    self._shared = None  # its memory is for the next one
                    self._shared = shape, SharedStep(weights, memory, capacity, beams)
                step = self._shared[1]
                step.load(memory, mask)
                return step
            except torch.OutOfMemoryError:
                self._shared = None  # a new step has no padding
        return Step(weights, memory, mask, capacity, beams)


def generate(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **how: Any) -> Tensor:
    """`Decoder(model).generate(input_ids, attention_mask, **how)`, for one batch."""
    return Decoder(model).generate(input_ids, attention_mask, **how)


def _greedy(step: Step, first: Tensor, length: int, stop: Tensor, pad: int) -> Tensor:
    """Greedy decoding whose bookkeeping is the step's own."""
    greedy, advance = step.greedy(first, stop, pad)
    rows = len(first)
    for position in range(length):
        advance()
        asks = len(stop) and (position + 1) % STEPS_BETWEEN_CHECKS == 0
        if asks and bool(greedy.ended[:rows].all()):
            break
    return greedy.written[:rows, : 1 + int(greedy.lengths[:rows].max())].clone()


def _one_by_one(
    step: Callable[[Tensor, int], Tensor],
    first: Tensor,
    length: int,
    do_sample: bool,
    processors: LogitsProcessorList,
    stop: Tensor,
    pad: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Greedy decoding or sampling."""
    written = torch.full((len(first), 1 + length), pad, device=first.device)
    written[:, 0] = tokens = first
    ended = torch.zeros_like(first, dtype=torch.bool)
    lengths = torch.zeros_like(first)
    for position in range(length):
        scores = processors(written[:, : position + 1], step(tokens, position))
        if do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator)[:, 0]
        else:
            tokens = scores.argmax(dim=-1)
        tokens = tokens.masked_fill(ended, pad)
        written[:, position + 1] = tokens
        lengths += ~ended
        if len(stop):
            ended |= torch.isin(tokens, stop)
            asks = not first.is_cuda or (position + 1) % STEPS_BETWEEN_CHECKS == 0
            if asks and bool(ended.all()):
                break
    return written[:, : 1 + int(lengths.max())]


def _beam_search(
    step: Callable[[Tensor, int], Tensor],
    reorder: Callable[[Tensor], None],
    first: Tensor,
    length: int,
    beams: int,
    processors: LogitsProcessorList,
    stop: Tensor,
    pad: int,
) -> Tensor:
    """Beam search. An item ends when its best open beam, at its present length, cannot pass the worst of its n finished
    ones; scores are mean log-probabilities of the tokens written.
    """
    items, device = len(first), first.device
    open_tokens = torch.full((items, beams, 1 + length), pad, device=device)
    open_tokens[:, :, 0] = first[:, None]
    # All beams start alike, so only the first counts.
    open_scores = torch.full((items, beams), HOPELESS, device=device)
    open_scores[:, 0] = 0.0
    done_tokens, done_scores = open_tokens.clone(), torch.full((items, beams), HOPELESS, device=device)
    done_lengths = torch.zeros(items, beams, dtype=torch.long, device=device)
    improvable = torch.ones(items, 1, dtype=torch.bool, device=device)
    candidates = max(2, 1 + len(stop)) * beams
    for position in range(length):
        written = position + 1
        logits = step(open_tokens[:, :, position].flatten(), position)
        scores = processors(open_tokens[:, :, :written].flatten(0, 1), torch.log_softmax(logits, dim=-1))
        scores = scores.unflatten(0, (items, beams)) + open_scores[..., None]
        best, index = scores.flatten(1).topk(candidates)
        vocabulary = scores.shape[-1]
        source, token = index // vocabulary, index % vocabulary
        rows = _take(open_tokens, source)
        rows[:, :, written] = token
        ends = torch.isin(token, stop) if written < length else torch.ones_like(token, dtype=torch.bool)

        open_scores, kept = (best + ends * HOPELESS).topk(beams)
        open_tokens = _take(rows, kept)
        reorder(_take(source, kept))

        # Only the n best candidates may finish; the others keep n beams open.
        finishes = ends & improvable
        finishes[:, beams:] = False
        finished_scores = torch.where(finishes, best / written, HOPELESS)
        done_scores, kept = torch.cat([done_scores, finished_scores], dim=1).topk(beams)
        done_tokens = _take(torch.cat([done_tokens, rows], dim=1), kept)
        lengths = torch.where(finishes, written, 0)
        done_lengths = _take(torch.cat([done_lengths, lengths], dim=1), kept)

        full = done_lengths > 0
        worst = torch.where(full, done_scores[:, -1:], HOPELESS)
        improvable &= (open_scores[:, :1] / written > worst).any(dim=1, keepdim=True)
        asks = not first.is_cuda or written % STEPS_BETWEEN_CHECKS == 0
        if asks and not bool(improvable.any()):
            break
    return done_tokens[:, 0, : 1 + int(done_lengths[:, 0].max())]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, m, ...) at index (B, k) of dimension 1."""
    return rows.gather(1, index.view(*index.shape, *(1,) * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:]))
