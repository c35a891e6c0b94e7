"""Faults that people have made in parallel trainers, as edits of our source; the everyday layouts must see each."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One edit: `old` becomes `new` in `module`, and the everyday layout `row` notices."""

    name: str
    row: str
    module: str
    old: str
    new: str


_SHARDS = "transmamba.parallel.shards"
_MODEL = "transmamba.model.model"
_LOSS = "transmamba.parallel.loss"
_CROSS_ENTROPY = "transmamba.kernels.cross_entropy.loss"

MUTATIONS = [
    Mutation(
        "partial sums not reduced",
        "tp2",
        _SHARDS,
        "return mappings.reduce_from_tensor_model_parallel_region(x_TBD.contiguous(), group=self.tp_group)",
        "return x_TBD",
    ),
    Mutation(
        "input gradients not reduced",
        "tp2",
        _SHARDS,
        "entered_TBD = mappings.copy_to_tensor_model_parallel_region(x_TBD, group=self.tp_group)",
        "entered_TBD = x_TBD",
    ),
    Mutation(
        "norm gradients not summed under sp", "tp2-sp", _SHARDS, "parameter.register_hook(self._sum_over_tp)", "pass"
    ),
    Mutation(
        "replicated gradient counted twice", "tp2", _SHARDS, "if self.sequence and self.tp > 1:", "if self.tp > 1:"
    ),
    Mutation(
        "split weights not marked for the norm",
        "tp2",
        _SHARDS,
        "if tp > 1:\n        parameter",
        "if tp > 9:\n        parameter",
    ),
    Mutation("decay not sharded", "cp2", _SHARDS, "[self.cp_rank]\n\n    def own_tokens", "[0]\n\n    def own_tokens"),
    Mutation(
        "off by one at the cp boundary",
        "cp2",
        _SHARDS,
        "return stream_BT.chunk(self.cp, dim=1)[self.cp_rank]",
        "return stream_BT.roll(int(self.cp_rank > 0), 1).chunk(self.cp, dim=1)[self.cp_rank]",
    ),
    Mutation(
        "heads interleaved on the way back",
        "cp2",
        _SHARDS,
        "received.permute(1, 2, 0, 3).flatten(-2)",
        "received.permute(1, 2, 3, 0).flatten(-2)",
    ),
    Mutation(
        "P taken as a local index",
        "cp2",
        "transmamba.model.mixer",
        "self.shards.own_tokens(documents.pos_BT >= transpoint).T",
        "(documents.pos_BT[:, : x_TBD.shape[0]] >= transpoint).T",
    ),
    Mutation(
        "conv tail across a document start",
        "tp2",
        "transmamba.model.mixing",
        "        documents=documents,\n        activation",
        "        documents=None,\n        activation",
    ),
    Mutation(
        "state across a document start",
        "tp2",
        "transmamba.model.mixing",
        "        documents=documents,\n        transpoint",
        "        documents=None,\n        transpoint",
    ),
    Mutation(
        "every tp rank starts from the first shard",
        "tp2",
        _SHARDS,
        "whole.chunk(self.tp, dim)[self.tp_rank]",
        "whole.chunk(self.tp, dim)[0]",
    ),
    Mutation(
        "two shards swapped",
        "tp2",
        _SHARDS,
        "whole.chunk(self.tp, dim)[self.tp_rank]",
        "whole.chunk(self.tp, dim)[self.tp - 1 - self.tp_rank]",
    ),
    Mutation(
        "layers named by their place in the stage",
        "pp2",
        _MODEL,
        "{str(index): Layer(",
        "{str(index - layers.start): Layer(",
    ),
    Mutation(
        "TransPoints by the place in the stage",
        "pp2",
        _MODEL,
        "transpoints[int(index)]",
        "transpoints[list(self.layers).index(index)]",
    ),
    Mutation(
        "padding counted",
        "tp2",
        _MODEL,
        "min(max(n_tokens_known - shards.tp_rank * shards.local(n_rows), 0), shards.local(n_rows))",
        "shards.local(n_rows)",
    ),
    Mutation(
        "targets looked up by global id",
        "tp2",
        _LOSS,
        "entry_TB = targets_TB - shards.tp_rank * weight_ED.shape[0]",
        "entry_TB = targets_TB",
    ),
    Mutation(
        "largest logit of this rank only",
        "tp2",
        _LOSS,
        "max_over_ranks=shards.max_over_tp",
        "max_over_ranks=lambda own: own",
    ),
    Mutation(
        "partition of this rank only",
        "tp2",
        _CROSS_ENTROPY,
        "sum_over_ranks(local.total_T * scale_T)",
        "local.total_T * scale_T",
    ),
    Mutation(
        "target logit of this rank only", "tp2", _CROSS_ENTROPY, "sum_over_ranks(local.target_T)", "local.target_T"
    ),
    Mutation(
        "token count of this rank",
        "dp2-zero1",
        "transmamba.batches",
        "float(self.topology.sum_rows(rows.weight_BT.sum(dtype=torch.float64)))",
        "float(rows.weight_BT.sum(dtype=torch.float64))",
    ),
    Mutation(
        "every rank takes the first rows",
        "dp2-zero1",
        "transmamba.batches",
        "topology.dp_rank * self.n_rows_local",
        "0 * self.n_rows_local",
    ),
    Mutation(
        "micro-batches weighted alike",
        "dp2-zero1",
        "transmamba.batches",
        "/ max(total, 1.0)",
        "/ windows.weight_BT[first:last].sum()",
    ),
    Mutation(
        "replicas' mean taken for their sum",
        "cp2",
        "transmamba.parallel.pipeline",
        "len(micro_batches) * stage.replicas",
        "len(micro_batches)",
    ),
    Mutation(
        "micro-batches' mean taken for their sum",
        "tp2",
        "transmamba.parallel.pipeline",
        "len(micro_batches) * stage.replicas",
        "stage.replicas",
    ),
    Mutation(
        "messages of two stages cross",
        "pp2-vpp2",
        "transmamba.parallel.pipeline",
        "batch_p2p_comm=not (parallel.vpp > 1 and parallel.pp == 2)",
        "batch_p2p_comm=True",
    ),
    Mutation(
        "cp left out of the replicas",
        "cp2",
        "transmamba.parallel.topology",
        "return self._state.get_data_parallel_group(with_context_parallel=True)",
        "return self._state.get_data_parallel_group()",
    ),
    Mutation(
        "tied gradients not summed", "pp2", "transmamba.parallel.zero", "if self.shared is not None:", "if False:"
    ),
    Mutation(
        "tied copy counted twice in the norm",
        "pp2",
        "transmamba.run",
        "            mark_copy(shared)",
        "            pass",
    ),
    Mutation(
        "chunks in blocks instead of turns",
        "pp2-vpp2",
        "transmamba.run",
        "layers[topology.pp_rank :: topology.pp]",
        "layers[topology.pp_rank * len(layers) // topology.pp : (topology.pp_rank + 1) * len(layers) // topology.pp]",
    ),
    Mutation(
        "ZeRO's forward hooks passed by",
        "dp2-zero3",
        "transmamba.run",
        "modules = [optimizer.module] if",
        "modules = [chunks[0]] if",
    ),
    Mutation(
        "clipping by the local norm",
        "tp2-zero0",
        "transmamba.parallel.gradients",
        "if topology.shards.tp * topology.pp > 1:",
        "if False:",
    ),
    Mutation(
        "replicated weights counted on every tp rank",
        "tp2-zero0",
        "transmamba.parallel.gradients",
        "shard_dim(parameter) is not None or topology.shards.tp_rank == 0",
        "True",
    ),
    Mutation(
        "gradients not averaged",
        "dp2-zero0",
        "transmamba.parallel.zero",
        "average_gradients(self.parameters, self.topology)",
        "pass",
    ),
]
