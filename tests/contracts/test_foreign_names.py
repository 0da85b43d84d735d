"""What is used of other packages although any release of theirs may drop it: all of it, and why.

A name with an underscore in front, or inside a module with one, is promised to nobody. Each use is
listed here; every name is looked up in the release that runs, or is used by a test that is named;
``make matrix`` runs both on all releases.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from tests.helpers.processes import ROOT
from torchrec_hilomoe.doctor import RELEASES

FOLDERS = ("apps", "benchmarks", "docs", "specs", "tests", "torchrec_hilomoe")
OWN = ("benchmarks", "specs", "tests", "torchrec_hilomoe")
SHARDED = "torch.distributed._shard.sharded_tensor"


@dataclass(frozen=True, kw_only=True)
class Use:
    """A name that is promised to nobody.

    Attributes:
        why: What it is for, and why nothing public does.
        files: Where it is used.
        there: Its dotted name, which every release must have; else a test that uses it.
    """

    why: str
    files: tuple[str, ...]
    there: str


USES = {
    f"{SHARDED}.ShardedTensor": Use(
        why="what TorchRec's state dicts hold; it has no public name",
        files=(
            "benchmarks/driving.py",
            "benchmarks/fuxictr_pairs/pair.py",
            "benchmarks/gpu/training.py",
            "benchmarks/side_by_side/dlrm.py",
            "benchmarks/throughput/checks.py",
            "tests/distributed/test_plan.py",
            "tests/helpers/sharded.py",
            "tests/helpers/staged_hosts.py",
            "torchrec_hilomoe/embeddings/frozen.py",
            "torchrec_hilomoe/training/checkpoint/reshard.py",
            "torchrec_hilomoe/training/checkpoint/state.py",
            "torchrec_hilomoe/training/non_finite.py",
        ),
        there=f"{SHARDED}.ShardedTensor",
    ),
    f"{SHARDED}.Shard": Use(
        why="a part of one, made anew on the host",
        files=("torchrec_hilomoe/training/checkpoint/state.py",),
        there=f"{SHARDED}.Shard",
    ),
    "torch.distributed._shard.metadata.ShardMetadata": Use(
        why="where a part lies",
        files=("torchrec_hilomoe/training/checkpoint/state.py",),
        there="torch.distributed._shard.metadata.ShardMetadata",
    ),
    "_init_from_local_shards_and_global_metadata": Use(
        why="makes a sharded tensor without asking other ranks, as a copy in the background must",
        files=("torchrec_hilomoe/training/checkpoint/state.py",),
        there=f"{SHARDED}.ShardedTensor._init_from_local_shards_and_global_metadata",
    ),
    "_process_group": Use(
        why="the copy of a sharded tensor is of the same group",
        files=("torchrec_hilomoe/training/checkpoint/state.py",),
        there="tests/unit/training/checkpoint",
    ),
    "_remote_device": Use(
        why="how a part's place is written",
        files=("torchrec_hilomoe/training/checkpoint/state.py",),
        there="torch.distributed._remote_device",
    ),
    "_get_metadata_path": Use(
        why="where DCP looks for its index",
        files=("torchrec_hilomoe/training/checkpoint/storage.py",),
        there="torch.distributed.checkpoint.FileSystemReader._get_metadata_path",
    ),
    "torch.distributed.optim._apply_optimizer_in_backward": Use(
        why="fuses a table's optimizer; TorchRec's own name for it is deprecated in its favour",
        files=(
            "benchmarks/gpu/sharded.py",
            "benchmarks/side_by_side/dlrm.py",
            "tests/helpers/staged_hosts.py",
            "torchrec_hilomoe/training/sharding/shard.py",
        ),
        there="torch.distributed.optim._apply_optimizer_in_backward",
    ),
    "torch.distributed._functional_collectives": Use(
        why="the collectives that torch.compile can trace",
        files=(
            "torchrec_hilomoe/backbones/layers/batch_norm.py",
            "torchrec_hilomoe/hilomoe/ranks.py",
        ),
        there="torch.distributed._functional_collectives.all_reduce",
    ),
    "torch.distributed.distributed_c10d._resolve_process_group": Use(
        why="a model keeps the name of its group, because a group cannot be copied or pickled",
        files=("torchrec_hilomoe/hilomoe/ranks.py",),
        there="torch.distributed.distributed_c10d._resolve_process_group",
    ),
    "torch.nn.modules.batchnorm._BatchNorm": Use(
        why="what is common to all batch norms, which freeze and are counted alike",
        files=(
            "torchrec_hilomoe/backbones/layers/batch_norm.py",
            "torchrec_hilomoe/training/stages/staging.py",
        ),
        there="torch.nn.modules.batchnorm._BatchNorm",
    ),
    "_BatchNorm": Use(
        why="the same, by attribute",
        files=("tests/unit/backbones/layers/test_batch_norm.py",),
        there="torch.nn.modules.batchnorm._BatchNorm",
    ),
    "_post_accumulate_grad_hooks": Use(
        why="whether the watch of the auxiliary losses' strength still listens",
        files=("tests/unit/hilomoe/test_strength_watch.py",),
        there="tests/unit/hilomoe/test_strength_watch.py",
    ),
    "torch._subclasses.fake_tensor.FakeTensorMode": Use(
        why="shapes without memory: a plan of tables that no host holds",
        files=(
            "tests/unit/hilomoe/test_hosts.py",
            "torchrec_hilomoe/models/flops.py",
            "torchrec_hilomoe/planning/activations.py",
        ),
        there="torch._subclasses.fake_tensor.FakeTensorMode",
    ),
    "_cdata": Use(
        why="tells whether two fake tensors share a storage, which has no address",
        files=(
            "benchmarks/throughput/device.py",
            "torchrec_hilomoe/planning/activations.py",
        ),
        there="tests/unit/planning/test_activations.py",
    ),
    "_lookups": Use(
        why="TorchRec keeps a sharded collection's kernels in a list, where modules() is blind",
        files=(
            "tests/distributed/test_planning.py",
            "tests/unit/embeddings/test_unpooled_as_pooled.py",
            "torchrec_hilomoe/embeddings/unpooled_as_pooled.py",
        ),
        there="tests/unit/embeddings/test_unpooled_as_pooled.py",
    ),
    "_embedding_bag_per_sample_weights_backward": Use(
        why="dot products of rows with chosen vectors, without gathering these",
        files=("torchrec_hilomoe/hilomoe/experts.py",),
        there="torch.ops.aten._embedding_bag_per_sample_weights_backward",
    ),
    "_C": Use(
        why="holds the names of this kind; nothing public tells who listens to operators",
        files=("torchrec_hilomoe/hilomoe/dispatch.py", "torchrec_hilomoe/hilomoe/passes.py"),
        there="torch._C",
    ),
    "_current_graph_task_id": Use(
        why="whether a backward runs, in which checkpointing computes a site again",
        files=("torchrec_hilomoe/hilomoe/passes.py",),
        there="torch._C._current_graph_task_id",
    ),
    "_autograd": Use(
        why="holds the next one",
        files=("torchrec_hilomoe/hilomoe/passes.py",),
        there="torch._C._autograd",
    ),
    "_get_current_graph_task_keep_graph": Use(
        why="whether a backward leaves its graph for another one",
        files=("torchrec_hilomoe/hilomoe/passes.py",),
        there="torch._C._autograd._get_current_graph_task_keep_graph",
    ),
    "_execution_engine": Use(
        why="calls back at the end of a backward, as DDP has it; nothing public does",
        files=("torchrec_hilomoe/hilomoe/passes.py",),
        there="torch.autograd.Variable._execution_engine.queue_callback",
    ),
    "torch.fx._symbolic_trace.is_fx_tracing": Use(
        why="hooks of a module run while FX traces, when parameters are proxies",
        files=("torchrec_hilomoe/hilomoe/host_watch.py",),
        there="torch.fx._symbolic_trace.is_fx_tracing",
    ),
    "_get_active_ddp_module": Use(
        why="a model does not know that DDP has wrapped it, and what DDP was told",
        files=("torchrec_hilomoe/hilomoe/host_watch.py",),
        there="torch.nn.parallel.DistributedDataParallel._get_active_ddp_module",
    ),
    "_version": Use(
        why="whether a parameter, or what a site has read, was written since, without a copy of it",
        files=(
            "torchrec_hilomoe/hilomoe/host_watch.py",
            "torchrec_hilomoe/hilomoe/probe/heard.py",
            "torchrec_hilomoe/hilomoe/probe/listener.py",
        ),
        there="torch.Tensor._version",
    ),
    "_are_functorch_transforms_active": Use(
        why="as torch.autograd.Function itself asks: transforms see operators alone",
        files=("torchrec_hilomoe/hilomoe/dispatch.py",),
        there="torch._C._are_functorch_transforms_active",
    ),
    "_len_torch_dispatch_stack": Use(
        why="counters of FLOPs see operators alone, which are slow where nobody listens",
        files=("torchrec_hilomoe/hilomoe/dispatch.py",),
        there="torch._C._len_torch_dispatch_stack",
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": Use(
        why="counts what ranks send; PyTorch documents it under this name",
        files=("benchmarks/throughput/traffic.py",),
        there="torch.utils._python_dispatch.TorchDispatchMode",
    ),
    "_actions": Use(
        why="the options of a parser of Python's argparse, to find a misspelled one",
        files=("torchrec_hilomoe/command_line.py",),
        there="tests/unit/test_command_line.py",
    ),
    "_exit": Use(
        why="documented by Python: ends a process whose threads are stuck",
        files=("torchrec_hilomoe/runtime/watchdog.py",),
        there="os._exit",
    ),
    "_max_gradient_norm": Use(
        why="drives FuxiCTR's trainer a step at a time; nothing public does; it is pinned",
        files=("benchmarks/fuxictr_pairs/pair.py",),
        there="benchmarks/fuxictr_pairs/pair.py",
    ),
    "_batch_index": Use(
        why="the same",
        files=("benchmarks/fuxictr_pairs/pair.py",),
        there="benchmarks/fuxictr_pairs/pair.py",
    ),
    "_forward_hooks": Use(
        why="tests count hooks that were left behind; copies of a model have hooks of their own",
        files=(
            "tests/numerics/test_sample_router.py",
            "tests/unit/embeddings/test_unpooled_as_pooled.py",
            "tests/unit/hilomoe/test_hosts.py",
            "tests/unit/hilomoe/test_report.py",
            "torchrec_hilomoe/embeddings/freezing.py",
            "torchrec_hilomoe/hilomoe/host_watch.py",
        ),
        there="tests/unit/embeddings/test_unpooled_as_pooled.py",
    ),
    "_forward_pre_hooks": Use(
        why="the same",
        files=("tests/numerics/test_sample_router.py", "tests/unit/hilomoe/test_hosts.py"),
        there="tests/numerics/test_sample_router.py",
    ),
    "_env": Use(
        why="TorchRec's wrapper does not tell the ranks among which it shards",
        files=("torchrec_hilomoe/training/stages/wrapping.py",),
        there="tests/unit/training/stages/test_driver.py",
    ),
    "_data_parallel_wrapper": Use(
        why="nor how it replicates the rest",
        files=("torchrec_hilomoe/training/stages/wrapping.py",),
        there="tests/unit/training/stages/test_driver.py",
    ),
    "_path_handlers": Use(
        why="tests take away a store that they registered with iopath",
        files=("tests/unit/runtime/test_paths.py", "tests/unit/test_command_line.py"),
        there="tests/unit/runtime/test_paths.py",
    ),
    "_inductor": Use(
        why="AOTInductor's compiler and loader, which PyTorch documents under this name alone",
        files=("torchrec_hilomoe/serving/package.py",),
        there="torch._inductor.aoti_load_package",
    ),
    "_app": Use(
        why="TorchX's dry run hands its scheduler's request out no other way",
        files=("tests/helpers/torchx_jobs.py",),
        there="tests/helpers/torchx_jobs.py",
    ),
}
# Public, but of one class and of a few releases: what unpooled_as_pooled.py does to a kernel.
KERNEL = ("embedding_specs", "feature_table_map", "is_nobag", "pooling_mode")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """The names that a file gives to something itself."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def foreign(tree: ast.AST, ours: set[str]) -> Iterator[str]:
    """The private names that a file takes from elsewhere; ``ours`` are those of all files."""
    here = defined(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if private(name) and name not in here:
                inherited = isinstance(value, ast.Name) and value.id in ("self", "cls")
                if not (inherited and name in ours):
                    yield name
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] not in OWN:
                inside = any(map(private, module.split(".")))
                yield from (f"{module}.{n.name}" for n in names if inside or private(n.name))
            case ast.Import(names=names):
                yield from (n.name for n in names if any(map(private, n.name.split("."))))


def used() -> dict[str, set[str]]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}
    ours = {name for tree in trees.values() for name in defined(tree)}
    found: dict[str, set[str]] = {}
    for file, tree in trees.items():
        for name in foreign(tree, ours):
            if file.startswith("tests/") and name in ours - USES.keys():
                continue  # a test that looks into what it tests
            found.setdefault(name, set()).add(file)
    return found


def test_every_use_is_listed_with_its_file_and_nothing_else_is():
    assert used() == {name: set(use.files) for name, use in USES.items()}


def test_a_use_that_is_not_listed_is_found():
    text = "from torch._dynamo import reset\nimport a._b\nself._c\nx._d\nx._e = 1\nx.__f__\n"
    found = list(foreign(ast.parse(text), {"_c"}))
    assert sorted(found) == ["_d", "_e", "a._b", "torch._dynamo.reset"]


def look_up(dotted: str) -> object:
    """Import as much of a dotted name as is a module, and ask that for the rest."""
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: object = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


# The one installed, named in each test; `make matrix` runs them with the others.
ON_THE_RELEASE = pytest.mark.parametrize(
    "release",
    [release for release in RELEASES if torch.__version__.startswith(f"{release.series}.")],
    ids=lambda release: f"torch-{release.series}",
)


def test_the_release_is_one_that_is_named():
    assert torch.__version__.rpartition(".")[0] in {release.series for release in RELEASES}


@ON_THE_RELEASE
@pytest.mark.parametrize("name", USES)
def test_it_has_the_name_or_a_test_uses_it(name, release):
    use = USES[name]
    if (ROOT / use.there).exists():
        assert Path(use.there).parts[0] in ("benchmarks", "tests")
    else:
        assert look_up(use.there) is not None


@ON_THE_RELEASE
def test_it_has_the_kernel_that_unpooled_as_pooled_knows(release):
    table = (4, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)
    kernel = SplitTableBatchedEmbeddingBagsCodegen(embedding_specs=[table])
    assert [name for name in KERNEL if getattr(kernel, name, None) is None] == []
    assert [tuple(spec) for spec in kernel.embedding_specs] == [table]
