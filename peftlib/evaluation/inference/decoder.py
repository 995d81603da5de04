"""Greedy answers to many prompts with continuous batching: a finished row frees its slot immediately.

A fixed number of slots in a fixed cache. Prompts are prefilled longest first; the next prompt takes the slot of a
finished row, or, when none is waiting, live rows are compacted, so that no compute is spent on finished rows. On a GPU
the step is a CUDA graph that also checks stop tokens, and the host checks only every few steps.
"""

import gc
from collections import deque
from dataclasses import dataclass

import torch

from peftlib.core.errors import ModelError
from peftlib.evaluation.inference.cuda_graphs import StepGraphs
from peftlib.evaluation.inference.forward import next_tokens, read_prompts, running, running_precision, slot_forwards
from peftlib.evaluation.inference.kv_cache import SlotCache, slot_bytes
from peftlib.models.chat_template import STOP_IDS
from peftlib.models.inspect import core

CPU_SLOTS = 128  # a step reads all weights, regardless of the number of rows
_CPU_CACHE_BYTES = 2 * 2**30  # fixed, so that answers do not depend on the memory that happens to be free
_MOST_SLOTS = 512
_FREE_SHARE = 0.8  # of the free GPU memory: the rest is for fragmentation and the driver
_REFILL_SHARE = 8  # prefill once 1/8 of the slots are free: a pass over few prompts costs as much as over many


@dataclass(frozen=True)
class Pace:
    """Device-specific batching. prompt_tokens: padded tokens per prefill pass. steps: between checks for finished
    rows. places: attention reads a multiple of this many cache positions. shrink: a step spans all slots, or their
    number divided by a power of `shrink`; 0: exactly the live ones."""

    prompt_tokens: int
    steps: int
    places: int
    shrink: int


CPU_PACE = Pace(prompt_tokens=640, steps=1, places=1, shrink=0)  # more tokens at a time exceed the processor's caches
# Each pair of places and span needs its own graph, whose capture costs as much as dozens of replays.
GPU_PACE = Pace(prompt_tokens=16384, steps=4, places=256, shrink=4)


def generate_by_slots(model, prompts, limits, *, slots=0, log=print):
    """Yield (number of the prompt, its new token ids) as answers finish, each once.

    prompts: non-empty lists of token ids; limits: maximum new tokens of each. A stop token ends an answer and is its
    last id. slots: rows per step, 0 for as many as fit. After an out-of-memory error the slots are halved and
    unfinished rows restart. ModelError: not even one row fits.
    """
    waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    slots = min(slots or planned_slots(model, prompts, limits), max(1, len(prompts)))
    while waiting:
        finished = set()
        try:
            with slot_forwards(model):
                for number, ids in _Decoder(model, prompts, limits, waiting, slots=slots).run():
                    finished.add(number)
                    yield number, ids
        except torch.OutOfMemoryError as error:
            if slots == 1:
                raise ModelError(
                    f"one row of {max(map(len, prompts)) + max(limits)} tokens does not fit this GPU's memory: "
                    "lower max_length or max_new_tokens, or free GPU memory"
                ) from error
        waiting = [i for i in waiting if i not in finished]
        if waiting:
            slots = max(1, slots // 2)
            gc.collect()
            torch.cuda.empty_cache()
            log(f"out of GPU memory: continuing with {slots} rows at a time")


def planned_slots(model, prompts, limits):
    """Number of rows that fit the memory if all were as long as the longest; a power of two on a GPU."""
    parameter = next(model.parameters())
    config, size = core(model).model.config, _dtype(model).itemsize
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    cache = slot_bytes(config, longest - 1, size)  # the last new token is never read
    if parameter.device.type != "cuda":
        return max(1, min(CPU_SLOTS, _CPU_CACHE_BYTES // cache))
    free, whole = torch.cuda.mem_get_info(parameter.device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # newer than Colab's torch
    share = int(fraction(parameter.device) * whole)  # if several runs share the GPU
    reserved, held = torch.cuda.memory_reserved(parameter.device), torch.cuda.memory_allocated(parameter.device)
    free = min(free + reserved - held, share - held)
    row = cache + 2 * config.vocab_size * size
    prompt_token = 4 * (8 * config.hidden_size + 4 * config.intermediate_size)  # bytes of a prompt's token, at most
    room = _FREE_SHARE * free - GPU_PACE.prompt_tokens * prompt_token
    slots = max(1, min(_MOST_SLOTS, int(room / row)))
    return 1 << (slots.bit_length() - 1)


def _dtype(model):
    """The dtype of keys and values: autocast's if the model runs in autocast."""
    device = next(model.parameters()).device.type
    with running_precision(model):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return core(model).get_input_embeddings().weight.dtype


class _Decoder:
    """One run over waiting prompts with a fixed number of slots.

    A live slot reads `tokens` at `positions`. Its first step reads the last prompt token, so that prefill needs no
    logits. A step covers the first `count` slots; finished ones among them do not advance.
    """

    def __init__(self, model, prompts, limits, waiting, *, slots):
        device = next(model.parameters()).device
        self.model, self.device, self.slots = model, device, slots
        self.pace = GPU_PACE if device.type == "cuda" else CPU_PACE
        self.prompts, self.limits, self.waiting = prompts, limits, deque(waiting)
        length = max(len(prompts[i]) + limits[i] for i in waiting) - 1
        length = -(-length // self.pace.places) * self.pace.places
        config = core(model).model.config
        self.cache = SlotCache(config, slots, length, dtype=_dtype(model), device=device)
        self.live, self.reach = {}, {}  # slot: number of its prompt; slot: its position
        self.count = 0
        self.state = torch.zeros((4, slots), dtype=torch.int64, device=device)
        self.tokens, self.positions, self.made, self.most = self.state
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        # One extra column, into which finished slots write.
        self.answers = torch.zeros((slots, max(limits) + 1), dtype=torch.int64, device=device)
        self.stops = torch.tensor(STOP_IDS, device=device)
        self.step = StepGraphs(self._step) if device.type == "cuda" else self._step

    def run(self):
        """Yield (number of the prompt, its new token ids) until no row is left."""
        left = []
        while self.waiting or self.live:
            with running(self.model):  # not around a yield: the caller must not run in this context
                self._advance()
            yield from left  # the caller processes them while the GPU works
            left = self._free_finished()
        yield from left

    def _advance(self):
        """Admit prompts and launch some steps; on a GPU without waiting for them."""
        self._admit()
        for _ in range(self.pace.steps):
            self.reach = {slot: position + 1 for slot, position in self.reach.items()}
            seen = -(-max(self.reach.values()) // self.pace.places) * self.pace.places
            self.step(self.count, min(seen, self.cache.length))

    def _admit(self):
        """Assign free slots to waiting prompts, if there are enough of either; then compact live slots."""
        free = [slot for slot in range(self.slots) if slot not in self.live]
        few = len(free) < max(1, self.slots // _REFILL_SHARE) and len(free) < len(self.waiting)
        if self.waiting and not (few and self.live):
            entered = list(zip(free, self.waiting))
            for part in _parts(entered, self.prompts, self.pace.prompt_tokens):
                self._read(part)
            for slot, number in entered:
                self.live[slot], self.reach[slot] = number, len(self.prompts[number]) - 1
                self.waiting.popleft()
        self._compact()

    def _read(self, part):
        """Prefill the prompts of [(slot, number), ...] up to their last tokens, and set the slots' states."""
        prompts = [self.prompts[number] for _, number in part]
        lengths = [len(prompt) - 1 for prompt in prompts]
        width = max(lengths)
        if self.pace.places > 1:
            width = min(-(-width // 8) * 8, self.cache.length)
        ids = torch.zeros((len(part), width), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - 1] = torch.tensor(prompt[:-1])
        limits = [self.limits[number] for _, number in part]
        columns = [[slot for slot, _ in part], [prompt[-1] for prompt in prompts], lengths, [0] * len(part), limits]
        columns = self._sent(torch.tensor(columns))
        slots = columns[0]
        if width:
            read_prompts(self.model, self.cache, self._sent(ids), slots=slots, lengths=columns[2])
        self.state[:, slots] = columns[1:]
        self.done[slots] = False

    def _sent(self, tensor):
        """The tensor on the device, without waiting for the device."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _step(self, count, seen):
        """One token for each of the first `count` slots, with fixed shapes and no host synchronization, so that a CUDA
        graph can capture it."""
        tokens, positions, done = self.tokens[:count], self.positions[:count], self.done[:count]
        chosen = next_tokens(self.model, self.cache, tokens, positions, seen=seen)
        made = self.made[:count]
        place = made.masked_fill(done, self.answers.shape[1] - 1)
        self.answers[:count].scatter_(1, place[:, None], chosen[:, None])
        goes_on = ~done
        tokens.copy_(torch.where(done, tokens, chosen))
        positions += goes_on
        made += goes_on
        done |= (chosen[:, None] == self.stops).any(1) | (made >= self.most[:count])

    def _free_finished(self):
        """Free finished slots; returns [(number, new token ids), ...]."""
        done = self.done[: self.count].tolist()
        slots = [slot for slot in self.live if done[slot]]
        if not slots:
            return []
        at = self._sent(torch.tensor(slots))
        rows = torch.cat([self.made[at][:, None], self.answers[at]], dim=1).tolist()
        for slot in slots:
            del self.reach[slot]
        return [(self.live.pop(slot), ids[:made]) for slot, (made, *ids) in zip(slots, rows, strict=True)]

    def _compact(self):
        """Move live slots into the gaps before them, so that a step spans as few slots as possible."""
        span = self._span(len(self.live))
        if span < self._span(max(self.live) + 1):
            beyond = [slot for slot in self.live if slot >= span]
            gaps = [slot for slot in range(span) if slot not in self.live]
            self._move(beyond, gaps[: len(beyond)])
        self.count = self._span(max(self.live) + 1)

    def _span(self, slots):
        """Slots that a step spans to reach the first `slots`."""
        if not self.pace.shrink:
            return slots
        span = self.slots
        while span // self.pace.shrink >= slots:
            span //= self.pace.shrink
        return span

    def _move(self, sources, targets):
        for source, target in zip(sources, targets, strict=True):
            self.live[target], self.reach[target] = self.live.pop(source), self.reach.pop(source)
        source, target = self._sent(torch.tensor([sources, targets]))
        self.cache.move(source, target)
        self.state[:, target] = self.state[:, source]
        self.answers[target] = self.answers[source]
        self.done[target] = self.done[source]
        self.done[source] = True


def _parts(entered, prompts, tokens):
    """Split [(slot, number), ...] into batches of at most `tokens` padded tokens, with at least one row."""
    part, width = [], 0
    for slot, number in entered:
        widest = max(width, len(prompts[number]))
        if part and widest * (len(part) + 1) > tokens:
            yield part
            part, widest = [], len(prompts[number])
        part.append((slot, number))
        width = widest
    if part:
        yield part
