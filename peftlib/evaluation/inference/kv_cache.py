"""A fixed-size key-value cache for many rows, each at its own position."""

import torch


def slot_bytes(config, length, itemsize):
    """Bytes that one row of at most `length` tokens takes. itemsize: bytes of one number."""
    tokens = sum(_sizes(config, length))
    return 2 * tokens * config.num_key_value_heads * config.head_dim * itemsize


def _sizes(config, length):
    """[tokens kept, ...] per layer: a sliding layer keeps its window in a ring buffer."""
    kept = {"sliding_attention": min(config.sliding_window or length, length)}
    return [kept.get(kind, length) for kind in config.layer_types]


class SlotCache:
    """Per layer keys and values (slots, heads, tokens kept, width), allocated once.

    A token's place is its position, in a sliding layer its position modulo the window, so that in every layer a row at
    position p sees the places up to p. Keys are stored rotated, so their order does not matter. A model receives the
    results of `prompts` or `steps`, which act as a transformers Cache in a forward pass; they do not subclass it,
    because that class changes between releases.
    """

    def __init__(self, config, slots, length, *, dtype, device):
        heads, width = config.num_key_value_heads, config.head_dim
        # Zeros: a masked place has weight 0, and 0 times an uninitialized NaN would be NaN.
        self.keys, self.values = (
            [torch.zeros((slots, heads, size, width), dtype=dtype, device=device) for size in _sizes(config, length)]
            for _ in range(2)
        )
        self.length, self.window = length, min(config.sliding_window or length, length)
        self.rows = torch.arange(slots, device=device)
        self.places = torch.arange(length, device=device)

    def prompts(self, slots, lengths):
        """Cache argument of a forward pass over right-padded prompts, which fills `slots`.

        slots, lengths: (n,) int64 on the device; lengths are the tokens of each prompt.
        """
        return _Prompts(self, slots, lengths)

    def steps(self, positions, seen):
        """Cache argument of a forward pass over one token of each of the first n slots.

        positions: (n,) int64. seen: number of places that attention reads, greater than every position.
        """
        return _Steps(self, positions, seen)

    def masks(self, positions, seen):
        """{layer type: (n, 1, 1, places)} to add to attention scores: 0 where a row may attend, else -inf."""
        hidden = self.places[:seen] > positions[:, None]
        full = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=hidden.device)
        full = full.masked_fill_(hidden, -torch.inf)[:, None, None]
        return {"full_attention": full, "sliding_attention": full[..., : self.window]}

    def move(self, sources, targets):
        """Copy whole rows from slots to other slots; both (n,) int64, disjoint."""
        for kept in (*self.keys, *self.values):
            kept[targets] = kept[sources]


class _Prompts:
    def __init__(self, cache, slots, lengths):
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def update(self, keys, values, layer, *args, **kwargs):
        """Store the prompts' keys and values (n, heads, T, width); returns them unchanged for attention."""
        for kept, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            size, width = kept.shape[2], new.shape[2]
            if width > size:
                new, width = self._newest(new, size), size
            kept[self.slots, :, :width] = new.to(kept.dtype)
        return keys, values

    def _newest(self, new, size):
        """(n, heads, size, width): at each place of the ring buffer the newest token of a row that belongs there."""
        last = self.lengths[:, None] - 1
        source = last - (last - self.cache.places[:size]) % size
        source = source.clamp_min(0)  # no token has reached the place yet; masked until one does
        return new.gather(2, source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))


class _Steps:
    def __init__(self, cache, positions, seen):
        self.cache, self.seen = cache, seen
        self.rows = cache.rows[: len(positions)]
        self.places = {cache.window: positions % cache.window, cache.length: positions}  # one key where both are equal

    def update(self, keys, values, layer, *args, **kwargs):
        """Store one token of each row (n, heads, 1, width); returns views of everything the rows may attend to."""
        views = []
        for kept, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            kept[self.rows, :, self.places[kept.shape[2]]] = new[:, :, 0].to(kept.dtype)
            views.append(kept[: len(self.rows), :, : self.seen])
        return views
