"""What the components ask of each scheduler: resources, variables, port, command, retries."""

import os
import shlex
import stat
import sys
from itertools import pairwise

import pytest

from tests.helpers.processes import run_command
from tests.helpers.torchx_jobs import render, SCHEDULERS

GPUS = ["-j", "2x8", "--gpu", "8", "--cpu", "96", "--memMB", "800000"]
# A scheduler names the host that the others look for in a variable of its own.
FIRST_HOST = {
    "local_cwd": "TORCHX_RANK0_HOST",
    "local_docker": "TORCHX_RANK0_HOST",
    "slurm": "SLURM_JOB_NODELIST_HET_GROUP_0",
    "kubernetes": "TORCHX_RANK0_HOST",
    "aws_batch": "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS",
}


def words(rendered):
    """The command in words; torchrun's line is one word of bash's."""
    program, *arguments = rendered.command
    return shlex.split(arguments[1]) if program == "bash" else [program, *arguments]


def options(rendered):
    """What torchrun and the app are given; torchrun's values are words of their own."""
    found = {}
    for word, following in pairwise([*words(rendered), ""]):
        if word.startswith("--"):
            name, is_given, value = word[2:].partition("=")
            found[name] = value if is_given else following
    return found


@pytest.mark.parametrize("scheduler", SCHEDULERS)
class TestOnEveryScheduler:
    def test_a_host_gets_its_resources(self, scheduler):
        rendered = render(scheduler, "train", *GPUS)
        assert rendered.hosts == 2
        assert rendered.resources in (None, {"cpu": 96, "gpu": 8, "memMB": 800_000})

    def test_variables_are_set_and_the_users_win(self, scheduler):
        found = render(scheduler, "train", *GPUS, "--env", "NCCL_DEBUG=INFO,NCCL_IB_HCA=mlx5")
        expected = {
            "OMP_NUM_THREADS": "12",
            "NCCL_DEBUG": "INFO",
            "NCCL_IB_HCA": "mlx5",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        assert expected.items() <= found.environment.items()

    def test_hosts_meet_at_the_first_ones_port(self, scheduler):
        rendered = render(scheduler, "train", *GPUS, "--rdzv_port", "12345")
        endpoint = f"${{{FIRST_HOST[scheduler]}:=localhost}}:12345"
        assert options(rendered)["rdzv_endpoint"] == endpoint
        assert rendered.app.roles[0].port_map == {"c10d": 12345}

    def test_the_app_runs_on_every_process_with_the_users_arguments(self, scheduler):
        rendered = render(scheduler, "train", *GPUS, "--", "--model.hilomoe.sites", "[head, ffn]")
        found = words(rendered)
        assert found[0] == "torchrun"
        assert options(rendered)["nnodes"] == "2"
        assert options(rendered)["nproc_per_node"] == "8"
        at = found.index("apps/train.py")
        assert found[at + 1 : at + 3] == ["--model.hilomoe.sites", "[head, ffn]"]

    def test_it_is_started_again_by_the_scheduler_and_by_torchrun(self, scheduler):
        rendered = render(scheduler, "train", *GPUS, "--max_retries", "4", "--max_restarts", "7")
        assert rendered.retries in (None, 4)
        assert options(rendered)["max_restarts"] == "7"
        assert options(render(scheduler, "train", *GPUS))["max_restarts"] == "3"
        assert options(render(scheduler, "train"))["max_restarts"] == "0"

    def test_a_run_finds_its_folder_again(self, scheduler):
        """The folder is named after the job, whose name outlives that it is started again."""
        rendered = render(scheduler, "train", *GPUS)
        folder, run_id = (options(rendered)[name] for name in ("out_dir", "rdzv_id"))
        assert folder == f"runs/{run_id}"
        assert len(run_id) > 1
        assert options(render(scheduler, "train", "--", "--out_dir=a"))["out_dir"] == "a"

    def test_preparing_is_one_process(self, scheduler):
        rendered = render(scheduler, "prepare", "--", "movielens", "--raw", "ml-1m", "--out", "o")
        expected = ["python", "apps/prepare.py", "movielens", "--raw", "ml-1m", "--out", "o"]
        assert list(rendered.command) == expected
        assert rendered.hosts == 1

    def test_a_sweep_has_a_role_and_a_folder_for_each_trial(self, scheduler):
        grid = "train.learning_rate=0.001,0.003 seed=0,1"
        rendered = render(scheduler, "sweep", "--grid", grid, "--out_dir", "runs/s")
        assert rendered.hosts == 4
        assert [role.name for role in rendered.app.roles] == [f"trial-{i}" for i in range(4)]
        tried = [shlex.split(role.args[1])[-3:] for role in rendered.app.roles]
        assert tried[2] == ["--train.learning_rate=0.003", "--seed=0", "--out_dir=runs/s/trial-2"]
        assert len({tuple(words) for words in tried}) == 4


def test_an_elastic_job_names_its_fewest_hosts_and_the_lanes_that_all_share():
    rendered = render("slurm", "train", "-j", "2:4x2", "--rdzv_conf", "join_timeout=1200")
    found = options(rendered)
    assert found["nnodes"] == "2:4"
    assert found["rdzv_conf"] == "join_timeout=1200"
    assert found["data.num_canonical_shards"] == "24"  # of 4, 6 and 8 ranks
    assert rendered.app.roles[0].min_replicas == 2
    assert rendered.hosts == 4
    own = render("slurm", "train", "-j", "2:4x2", "--", "--data.num_canonical_shards", "48")
    assert words(own).count("--data.num_canonical_shards") == 1
    assert "data.num_canonical_shards=24" not in str(words(own))


def test_on_kubernetes_the_fewest_pods_are_enough_and_one_that_fails_does_not_end_the_others():
    job = render("kubernetes", "train", "-j", "1:2x1", "--max_retries", "2").request.resource
    first, second = job["spec"]["tasks"]
    assert (first["minAvailable"], second["minAvailable"]) == (1, 0)
    assert not any(policy["action"] == "RestartJob" for policy in second["policies"])


def test_mounts_and_the_image_reach_a_container():
    mount = "type=bind,src=/mnt/shared,dst=/data,readonly"
    rendered = render("local_docker", "evaluate", "--image", "i:1", "--mounts", mount, "--", "c")
    (container,) = rendered.request.containers
    assert container.image == "i:1"
    (found,) = container.kwargs["mounts"]
    assert (found["Source"], found["Target"], found["ReadOnly"]) == ("/mnt/shared", "/data", True)
    assert words(rendered)[-2:] == ["apps/evaluate.py", "c"]


def test_a_benchmark_is_a_module_and_needs_torchrun_for_several_processes_only():
    alone = render("slurm", "benchmark", "--bench", "hilomoe", "--", "--out", "r.jsonl")
    assert words(alone) == ["python", "-m", "benchmarks.bench_hilomoe", "--out", "r.jsonl"]
    several = words(render("slurm", "benchmark", "-j", "1x2", "--bench", "hilomoe"))
    assert several[0] == "torchrun"
    assert several[-2:] == ["-m", "benchmarks.bench_hilomoe"]


def test_a_single_host_meets_nobody_at_a_port():
    """Or two jobs of one machine would want the same."""
    rendered = render("local_docker", "train", "-j", "1x2")
    assert options(rendered)["rdzv_endpoint"] == "localhost:0"
    assert rendered.app.roles[0].port_map == {}


def test_a_named_resource_takes_the_place_of_figures():
    rendered = render("slurm", "train", "-j", "1x8", "-h", "aws_p4d.24xlarge")
    assert rendered.resources is not None
    assert rendered.resources["gpu"] == 8
    assert rendered.environment["OMP_NUM_THREADS"] == str(rendered.resources["cpu"] // 8)


def test_here_there_are_no_more_threads_than_cpus(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torchx", "run", "-s", "local_cwd", "specs/train.py:train"])
    found = render("local_cwd", "train", "-j", "1x2", "--cpu", "4096").environment
    assert int(found["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)


def test_the_words_survive_slurms_script_and_both_shells(tmp_path):
    """The script itself, run by bash; ``srun`` and ``torchrun`` are ones that say what they got."""
    said = tmp_path / "said"
    scripts = {
        "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
        "torchrun": f"printf '%s\\n' \"$@\" > {said}",
    }
    for name, script in scripts.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    arguments = ["--", "--model.hilomoe.sites", "[head, 'ffn']", "--data.path", "a b"]
    script = render("slurm", "train", *arguments).request.materialize()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    result = run_command(["bash", "-c", script], env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = said.read_text().splitlines()
    assert found[found.index("--rdzv_id") + 1] == "17"
    at = found.index("apps/train.py")
    assert found[at + 1 :] == [*arguments[1:], "--out_dir=runs/17"]
