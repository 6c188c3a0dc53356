"""What one of several processes does: ``worker.py SCENARIO FOLDER RANK SIZE``; its result is SCENARIO-RANK.pt there."""

import functools
import os
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import byol_fast as bf

ROWS = torch.from_numpy(load_digits().data)[:500] / 16
LABELS = torch.from_numpy(load_digits().target)[:500]
adam = functools.partial(torch.optim.Adam, lr=3e-3)
hasty = functools.partial(torch.optim.SGD, lr=4.0)
joint = {"method": "joint", "epochs": 3, "batch_size": 64, "optimizer": adam}


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return bf.Bottleneck(64, 6, dtype=torch.float64, **options)


def outcome(result):
    module = getattr(result, "module", None) or result.model
    table = [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]
    return {"state": {name: value.clone() for name, value in module.state_dict().items()}, "table": table}


def trained(data=ROWS, module=None, **options):
    return outcome(bf.pretrain(layer() if module is None else module, data, **options))


class Deep(nn.Module):
    """A model of one's own that contains a bottleneck."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(64, 64, dtype=torch.float64)
        self.inner = bf.Bottleneck(64, 6, dtype=torch.float64)

    def reconstruction_loss(self, input):
        return nn.functional.mse_loss(self.inner(self.mix(input)), input)


def deep():
    torch.manual_seed(0)
    return Deep()


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        layer(), nn.Linear(64, 32, dtype=torch.float64), nn.ReLU(), nn.Linear(32, 10, dtype=torch.float64)
    )


def finetuned(model, **options):
    data = (ROWS, LABELS)
    return outcome(bf.finetune(model, data, loss=nn.functional.cross_entropy, epochs=2, optimizer=adam, **options))


def scenarios(folder):
    """Those that have to give the same with one process as with several."""
    return {
        "exact": lambda: trained(),
        "alternate": lambda: trained(method="alternate", epochs=5),
        "joint": lambda: trained(**joint, validation=0.2, clip_norm=0.05),
        "joint, full batch": lambda: trained(**{**joint, "batch_size": None}),
        "joint, non-linear": lambda: trained(module=layer(activation="gelu"), **joint),
        "alternate, non-linear": lambda: trained(module=layer(activation="tanh"), **{**joint, "method": "alternate"}),
        "joint, a batch is one row": lambda: trained(ROWS[:5], **{**joint, "batch_size": 1}),
        "exact, one row": lambda: trained(ROWS[:1]),
        "any module": lambda: trained(module=deep(), **joint),
        "finetune": lambda: finetuned(classifier()),
        "early stop": lambda: trained(
            ROWS[:80], **{**joint, "epochs": 12, "optimizer": hasty}, validation=0.2, patience=2
        ),
        "resumed": lambda: resumed(folder / f"resumed-{distributed_size()}.pt"),
    }


def resumed(path):
    trained(**{**joint, "epochs": 2}, checkpoint=path, checkpoint_every=3)
    return trained(module=layer(1), **joint, checkpoint=path, resume=True)


def distributed_size():
    return distributed.get_world_size() if distributed.is_initialized() else 1


# ------------------------------------------------------------------------------------------- several processes only


def same(folder):
    return {name: run() for name, run in scenarios(folder).items()}


def loaders(folder):
    """Each process has batches of its own; the second has fewer, then none."""
    rank = distributed.get_rank()
    own = ROWS[:300] if rank == 0 else ROWS[300:350]
    loader = DataLoader(TensorDataset(own), batch_size=50)
    results = {"uneven": trained(loader, **joint), "exact": trained(loader)}
    empty = DataLoader(TensorDataset(ROWS[: 300 * (1 - rank)]), batch_size=50)
    results["exact, one has no rows"] = trained(empty)
    try:
        trained(empty, **joint)
    except ValueError as error:
        results["error"] = str(error)
    return results


def wrapped(folder):
    """Models that average or shard by themselves."""
    from torch.distributed.fsdp import fully_shard

    results = {"ddp": finetuned(nn.parallel.DistributedDataParallel(classifier()))}

    def shard(model):
        for child in model.children():
            if not isinstance(child, nn.ReLU):
                fully_shard(child)
        return fully_shard(model)

    def whole(result):
        return {**result, "state": {name: value.full_tensor() for name, value in result["state"].items()}}

    results["fsdp"] = whole(finetuned(shard(classifier()), checkpoint=folder / "fsdp.pt"))
    results["fsdp, any module"] = whole(trained(module=shard(deep()), **joint))
    path = folder / "fsdp-resumed.pt"
    trained(module=shard(deep()), **{**joint, "epochs": 2}, checkpoint=path)
    results["fsdp, resumed"] = whole(trained(module=shard(deep()), **joint, checkpoint=path, resume=True))
    return results


def dies(folder):
    """The second process ends without a word in the third epoch."""

    class Mortal(bf.Bottleneck):
        calls = 0

        def reconstruction_loss(self, *args):
            self.calls += 1
            if distributed.get_rank() == 1 and self.calls == 20:
                os._exit(9)
            return super().reconstruction_loss(*args)

    torch.manual_seed(0)
    return trained(module=Mortal(64, 6, activation="relu"), **joint, checkpoint=folder / "run.pt")


def interrupted(folder):
    """Ctrl-C reaches only the second process."""
    import signal

    class Impatient(bf.Bottleneck):
        calls = 0

        def reconstruction_loss(self, *args):
            self.calls += 1
            if distributed.get_rank() == 1 and self.calls == 12:
                os.kill(os.getpid(), signal.SIGINT)
            return super().reconstruction_loss(*args)

    torch.manual_seed(0)
    try:
        trained(module=Impatient(64, 6, activation="relu"), **joint, checkpoint=folder / "run.pt")
    except KeyboardInterrupt:
        return "interrupted"


if __name__ == "__main__":
    name, folder, rank, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    # Processes share the machine.
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=size)
    torch.save(globals()[name](folder), folder / f"{name}-{rank}.pt")
    distributed.destroy_process_group()
    # DTensor's caches keep a gloo group and its threads alive for good, and a thread that drops the last reference to a
    # tensor while the interpreter shuts down aborts the process (pytorch/pytorch#190489). All work is saved by now.
    os._exit(0)
