"""What autograd keeps between a student's forward and its backward pass, and what comes on top while they run. No torch here.

Counted tensor by tensor, as torch saves them for Megatron's local layers (measured: tests/plan/test_activations.py), and from
the code of Transformer Engine's layers for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from unisd_megatron.config import Layout
from unisd_megatron.families import Arch
from unisd_megatron.plan.kernels import Kernels
from unisd_megatron.plan.parameters import layers_of

_CPU_CHUNK, _CHUNK = 3 << 23, 1 << 27  # losses/fused.py's: logits of a chunk
_PRODUCT = 1 << 24  # losses/fused.py's: numbers of a product that is added to the head's gradient


@dataclass(frozen=True)
class Rows:
    """A micro-batch: sequences of `prompt` + `completion` tokens each."""

    sequences: int
    prompt: int
    completion: int

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def kept(self) -> int:
        """Tokens in the loss."""
        return self.sequences * self.completion


@dataclass(frozen=True)
class Activations:
    """Bytes of a rank at the peak of the student's pass. saved: for the backward pass; heard: the teacher's hidden states of
    all micro-batches, which wait for the student's; working: chunks of logits, gradients on their way, buffers."""

    saved: int
    heard: int
    working: int

    @property
    def total(self) -> int:
        return self.saved + self.heard + self.working


@dataclass(frozen=True)
class _Layer:
    """Bytes that one layer saves. entry: its input, which is all that full recomputation keeps; core: what selective
    recomputation makes again, and behind: what the backward pass has freed by then."""

    saved: int
    entry: int
    shared_entry: int  # of `entry`, what is among `saved` too
    core: int
    instead: int  # kept in place of `core` under selective recomputation
    behind: int


class _Counter:
    """The tensors of one layer of one micro-batch on one rank."""

    def __init__(self, arch: Arch, layout: Layout, rows: Rows, how: Kernels) -> None:
        self.arch, self.layout, self.rows, self.how = arch, layout, rows, how
        tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
        self.width = 2 if layout.bf16 else 4
        self.tokens = -(-rows.tokens // context)
        self.cut = -(-self.tokens // tensor) if layout.sequence_parallel else self.tokens  # of what SP shards
        self.heads, self.groups = arch.num_attention_heads // tensor, arch.num_query_groups // tensor
        self.query, self.key = self.heads * arch.head_dim, self.groups * arch.head_dim
        self.ffn = arch.ffn_hidden_size // tensor

    def norm(self, *, kept_output: bool = True) -> int:
        """Over the hidden size. Composed of torch's operations it keeps its input and the normalized one in fp32."""
        per_token = self.arch.hidden_size * ((2 * self.width if kept_output else self.width) if self.how.engine else 8)
        if kept_output and not self.how.engine:
            per_token += self.arch.hidden_size * self.width
        return self.cut * (per_token + 4)

    def head_norms(self) -> int:
        """Of queries and keys; in fp32 keys are normalized where they lie, among queries and values (`projected`)."""
        if not self.arch.qk_norm:
            return 0
        statistics = 4 * self.tokens * (self.heads + self.groups)
        if self.how.engine:
            return statistics + self.width * self.tokens * (self.query + self.key)
        keys = self.key if self.width == 4 else 2 * self.key
        return statistics + 4 * self.tokens * (2 * self.query + keys)

    @property
    def projected(self) -> int:
        """The output of the projection to queries, keys and values, which stays while a view of it does."""
        return self.width * self.tokens * (self.query + 2 * self.key)

    def attention(self) -> tuple[int, int, int]:
        """`(core, instead, beside)`: what the core keeps, what stays when it is made again, what else the block keeps."""
        positions = self.rows.length if not self.layout.packing else self.tokens
        beside = 4 * self.width * positions * self.arch.head_dim  # RoPE's tables, for queries and keys
        beside += self.width * self.tokens * self.query  # the core's output
        instead = self.width * self.tokens * (self.query + self.key) + self.projected
        in_place = self.arch.qk_norm and self.width == 4 and not self.how.engine  # `head_norms` keeps `projected` anyway
        if in_place:
            beside, instead = beside + self.projected, instead - self.projected
        if self.how.flash:
            return instead + 4 * self.tokens * self.heads, instead, beside
        pairs = self.rows.length * -(-self.rows.length // self.layout.context_parallel_size)
        masks = self.rows.sequences if self.layout.packing else 1
        core = pairs * (self.rows.sequences * self.heads * (4 if self.width == 4 else 6) + masks)
        core += self.width * self.tokens * self.query
        if self.heads == self.groups and self.layout.context_parallel_size == 1:
            core += self.width * self.tokens * self.key + (0 if in_place else self.projected)
        else:  # keys and values of whole sequences, repeated for the queries of their group
            core += 2 * self.width * self.rows.tokens * self.query
        return core, instead, beside

    def feed_forward(self) -> int:
        """The feed-forward block, or router and experts, which are taken to have equally many tokens."""
        kept = 3 if self.how.fused_gate else 5
        if self.arch.experts is None:
            return self.width * self.tokens * kept * self.ffn
        slots = self.tokens * self.arch.experts.per_token
        routing = self.cut * self.arch.experts.count * (self.width + 1) + 12 * self.cut * self.arch.experts.per_token
        return slots * (self.width * (self.arch.hidden_size + (kept + 1) * self.ffn + 1) + 8) + routing

    def layer(self) -> _Layer:
        core, instead, beside = self.attention()
        norms = 2 * self.norm() + (2 * self.norm(kept_output=False) if self.arch.sandwich_norms else 0)
        mlp = self.feed_forward()
        entry = self.cut * self.arch.hidden_size * self.width
        shared = self.how.engine or self.width == 4
        output = self.width * self.tokens * self.query
        return _Layer(
            saved=norms + self.head_norms() + core + beside + mlp,
            entry=entry,
            shared_entry=entry if shared else 0,
            core=core,
            instead=instead,
            behind=mlp + self.norm() + output,
        )

    def ending(self) -> int:
        """The final norm, and of the kept tokens both models' hidden states and a dozen numbers."""
        kept = -(-self.rows.kept // self.layout.context_parallel_size)
        return self.norm(kept_output=False) + kept * (2 * self.width * self.arch.hidden_size + 72)


def held_layers(arch: Arch, layout: Layout, stage: int, micro_batches: int) -> int:
    """Layers, times micro-batches, whose activations a stage holds at the peak of 1F1B, plain or interleaved."""
    stages, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if chunks is None:
        return min(micro_batches, stages - stage) * layers_of(arch, layout, stage, 0)
    # Forward passes before the first backward: each chunk in turn, for as many micro-batches as there are stages.
    ahead = min(micro_batches * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)
    return sum(layers_of(arch, layout, stage, number // stages % chunks) for number in range(ahead))


def activations(
    arch: Arch,
    layout: Layout,
    rows: Rows,
    *,
    stage: int = 0,
    micro_batches: int = 1,
    how: Kernels | None = None,
    fused: bool = True,
    teacher: bool = True,
) -> Activations:
    """At the peak of the student's pass on a rank of a pipeline stage, all micro-batches being as `rows`.

    Args: how: what layers are computed with (None: as on a CPU); fused: whether the loss walks the vocabulary in chunks;
    teacher: whether there is one, whose hidden states are compared with.
    """
    on_cpu = how is None or how == Kernels()
    counter = _Counter(arch, layout, rows, how or Kernels())
    layer, held = counter.layer(), held_layers(arch, layout, stage, micro_batches)
    is_last = stage == layout.pipeline_model_parallel_size - 1
    ending = counter.ending() if is_last else 0
    if layout.recompute_granularity == "full":
        again = layer.saved - layer.shared_entry
        saved = held * layer.entry + max(ending, again)
    elif layout.recompute_granularity == "selective":
        each = layer.saved - layer.core + layer.instead
        saved = held * each + max(ending, layer.core - layer.instead - layer.behind)
    else:
        saved = held * layer.saved + ending
    hidden = counter.cut * arch.hidden_size * counter.width
    in_flight = held / max(1, layers_of(arch, layout, stage, 0))
    on_the_way = 0 if is_last else int(in_flight * hidden)  # outputs that the next stage was sent
    kept = -(-rows.kept // layout.context_parallel_size)
    heard = micro_batches * kept * arch.hidden_size * counter.width if is_last and teacher else 0
    working = max(_backward(counter), _loss(counter, kept, on_cpu=on_cpu, fused=fused) if is_last else 0)
    return Activations(saved, heard, on_the_way + working)


def _backward(counter: _Counter) -> int:
    """Gradients while one layer's backward pass runs: of its widest tensors, and of attention scores where there are any."""
    experts = 1 if counter.arch.experts is None else counter.arch.experts.per_token
    wide = counter.width * counter.tokens * (4 * counter.ffn * experts + 2 * counter.arch.hidden_size)
    if counter.how.flash:
        return wide
    pairs = counter.rows.length * -(-counter.rows.length // counter.layout.context_parallel_size)
    return max(wide, pairs * counter.heads * (8 + 2 * counter.width))


def _loss(counter: _Counter, kept: int, *, on_cpu: bool, fused: bool) -> int:
    """Logits of both models, a chunk of them or all, and the gradients of hidden states and head."""
    columns = counter.arch.padded_vocab_size // counter.layout.tensor_model_parallel_size
    head = columns * counter.arch.hidden_size
    gradients = counter.width * (kept * counter.arch.hidden_size + head) + counter.width * min(_PRODUCT, head)
    if not fused:
        return gradients + 16 * kept * columns
    chunk = max(32, (_CPU_CHUNK if on_cpu else _CHUNK) // columns // 32 * 32)
    return gradients + min(chunk, kept) * columns * (2 * counter.width + (8 if on_cpu else 0))


def reading(arch: Arch, layout: Layout, rows: Rows, how: Kernels, *, fused: bool) -> int:
    """On top of weights while the teacher reads: one layer's tensors, and logits on the last stage. An upper bound."""
    counter = _Counter(arch, layout, rows, how)
    kept = -(-rows.kept // layout.context_parallel_size)
    one = counter.layer().saved + 2 * counter.cut * arch.hidden_size * counter.width
    return max(one, _loss(counter, kept, on_cpu=how == Kernels(), fused=fused))
