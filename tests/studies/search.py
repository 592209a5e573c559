"""Which signals of a training, of which epochs and of how many networks, find most wrong labels? A search, run once.

    python tests/studies/search.py DIR FOLDER          # trains what is not there yet, on a GPU, all at once
    python tests/studies/search.py DIR FOLDER --print  # the table of candidates

DIR holds class folders in train/ and test/. Each training keeps in FOLDER, for all images: the margin in the training
batch and the margin of the unaugmented image, by epoch; the loss; and the vote of the nearest neighbours.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from study import wrong_labels

import detect_mislabeled_dataset as detect
import pipeline
import train

BATCH, PEAK, WEIGHT_DECAY = 128, 0.4, 3e-3
NOISES = {"uniform": 0.1, "similar": 0.2}
NEIGHBOURS = (30, 100, 300)
# name, seed, epochs, fraction left out of the ranking by the mean over the first three
FIRST = [(str(k), 1004 + k, 25, 0.0) for k in range(3)]
SECOND = [("x0", 2004, 25, {"uniform": 0.1, "similar": 0.15}), ("x1", 2005, 25, {"uniform": 0.1, "similar": 0.15})]
LONG = [("50", 1004, 50, 0.0)]


def record(args, noise, name, seed, epochs, left_out):
    """Trains one network and writes what it knows of each image."""
    device = pipeline.choose_device("auto", several_processes=False)
    dtype = pipeline.choose_dtype("auto", device)
    clean = pipeline.load_data("imagefolder", args.dir, "train", args.num_train_examples, args.folder)
    test = pipeline.load_data("imagefolder", args.dir, "test", None, args.folder)
    data = wrong_labels(clean, noise, NOISES[noise], pipeline.CORRUPTION_SEED).to(device)
    kept = torch.arange(len(data))
    if left_out:
        order = np.argsort(-np.load(args.folder / f"first_{noise}.npy"), kind="stable")
        kept = torch.from_numpy(np.sort(order[round(left_out * len(data)) :]))
    kept = kept.to(device)
    torch.manual_seed(seed)
    model, generator = pipeline.construct_resnet9(len(data.class_names)).to(device), train.batch_generator(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, weight_decay=WEIGHT_DECAY)
    steps = len(kept) // BATCH
    in_batch, unaugmented = np.full((2, epochs, len(data)), np.nan, np.float16)
    for epoch in range(epochs):
        model.train()
        margins = torch.full((len(data),), torch.nan, device=device)
        plan = (tensor.to(device) for tensor in train.epoch_batches(len(kept), BATCH, generator))
        for step, (order, offsets, flips) in enumerate(zip(*plan, strict=True), start=epoch * steps):
            optimizer.param_groups[0]["lr"] = PEAK * train.schedule(step, epochs * steps)
            images = pipeline.normalize(train.crop_and_flip(data.images[kept[order]], offsets, flips))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits, labels = model(images), data.labels[kept[order]]
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            margins[kept[order]] = pipeline.margin(logits.detach(), labels, torch.amax)
        logits = pipeline.compute_logits(model, data.images, 2048, dtype)
        in_batch[epoch] = margins.half().cpu()
        unaugmented[epoch] = pipeline.margin(logits, data.labels, torch.amax).half().cpu()
    predicted = pipeline.compute_logits(model, test.images.to(device), 2048, dtype).argmax(1).cpu()
    found = {"in_batch": in_batch, "unaugmented": unaugmented, "accuracy": (predicted == test.labels).float().mean()}
    found["loss"] = F.cross_entropy(logits, data.labels, reduction="none").cpu()
    found |= votes(model, data, kept, dtype) | {"is_corrupted": data.is_corrupted.cpu()}
    with pipeline.atomic_path(args.folder / f"{noise}_{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **found)


@torch.no_grad()
def votes(model, data, kept, dtype):
    """Returns the share of the k nearest images in `kept` that have the image's label, less the largest of another."""
    with torch.autocast(data.images.device.type, dtype, enabled=dtype != torch.float32):
        pairs = [(model.features(pipeline.normalize(x)), model.features(pipeline.normalize(x.flip(3))))
                 for x in data.images.split(2048)]  # fmt: skip
    features = F.normalize(torch.cat([a.float() + b.float() for a, b in pairs]), dim=1)
    left_out = torch.ones(len(data), dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    found = {k: [] for k in NEIGHBOURS}
    for rows in torch.arange(len(data), device=kept.device).split(2048):
        similarity = features[rows] @ features.T
        similarity[torch.arange(len(rows)), rows] = -2
        similarity[:, left_out] = -2
        nearest = similarity.topk(max(NEIGHBOURS), 1).indices
        for k, parts in found.items():
            shares = F.one_hot(data.labels[nearest[:, :k]], len(data.class_names)).float().mean(1)
            parts.append(pipeline.margin(shares, data.labels[rows], torch.amax))
    return {f"vote{k}": torch.cat(parts).half().cpu() for k, parts in found.items()}


def late(run, start, end=1.0, clamp=np.inf):
    """Returns the mean margin in the batches of a part of the epochs; of images in no batch the final margin."""
    margins = run["in_batch"].astype(np.float32)
    part = margins[round(start * len(margins)) : round(end * len(margins))].clip(-clamp, clamp)
    visits = (~np.isnan(part)).sum(0)
    return np.where(visits > 0, np.nansum(part, 0) / np.maximum(visits, 1), final(run))


def final(run):
    return run["unaugmented"][-1].astype(np.float32)


def standardise(values):
    return (values - values.mean()) / values.std()


def candidates(runs):
    """Yields name and suspicion of each candidate, of the mean over runs."""

    def mean(signal):
        return np.mean([signal(run) for run in runs], 0)

    yield "aum, all epochs", -mean(lambda run: late(run, 0))
    yield "0.75 aum + 0.25 margin (the default before)", -0.75 * mean(lambda run: late(run, 0)) - 0.25 * mean(final)
    for start in (0.2, 0.52, 0.68, 0.76, 0.84, 0.92):
        yield f"aum, epochs from {start} on", -mean(lambda run, start=start: late(run, start))
    for end in (0.32, 0.52, 0.8):
        yield f"aum, epochs up to {end}", -mean(lambda run, end=end: late(run, 0, end))
    for clamp in (1, 2, 4):
        yield f"aum, clamped to ±{clamp}", -mean(lambda run, clamp=clamp: late(run, 0, clamp=clamp))
    yield "mean margin of unaugmented images", -mean(lambda run: run["unaugmented"].astype(np.float32).mean(0))
    yield "final margin", -mean(final)
    yield "final loss", mean(lambda run: run["loss"].astype(np.float32))
    for k in NEIGHBOURS:
        vote = mean(lambda run, k=k: run[f"vote{k}"].astype(np.float32))
        yield f"vote of {k}", -vote
        aum = mean(lambda run: late(run, 0.76))
        for weight in (0.5, 1, 2):
            yield f"aum of the last quarter + {weight} vote of {k}", -standardise(aum) - weight * standardise(vote)
        yield f"final margin + vote of {k}", -standardise(mean(final)) - standardise(vote)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_train_examples", type=int)
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--job", help="one training, in a process of its own")
    args = parser.parse_args()
    pipeline.make_folder(args.folder)
    if args.job:
        noise, name = args.job.split("_")
        _, seed, epochs, left_out = next(job for job in FIRST + SECOND + LONG if job[0] == name)
        return record(args, noise, name, seed, epochs, left_out[noise] if left_out else 0)
    for jobs in [] if args.print else [FIRST + LONG, SECOND]:
        names = [f"{noise}_{job[0]}" for noise in NOISES for job in jobs]
        words = [sys.executable, __file__, *sys.argv[1:], "--job"]
        processes = [subprocess.Popen([*words, name]) for name in names if not (args.folder / f"{name}.npz").exists()]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit("a training failed")
        for noise in NOISES:
            runs = [np.load(args.folder / f"{noise}_{job[0]}.npz") for job in FIRST]
            aum, end = (np.mean([signal(run) for run in runs], 0) for signal in (lambda run: late(run, 0), final))
            np.save(args.folder / f"first_{noise}.npy", -0.75 * aum - 0.25 * end)
    for noise in NOISES:
        groups = {"one network": FIRST[:1], "mean of three": FIRST, "one of 50 epochs": LONG}
        groups |= {
            "second round, one": SECOND[:1],
            "second round, two": SECOND,
            "first three and these": FIRST + SECOND,
        }
        for group, jobs in groups.items():
            runs = [np.load(args.folder / f"{noise}_{job[0]}.npz") for job in jobs]
            print(f"\n{noise}, {group}: test accuracy " + ", ".join(f"{100 * run['accuracy']:.2f} %" for run in runs))
            for name, scores in candidates(runs):
                found = detect.evaluate_ranking(scores, runs[0]["is_corrupted"])
                cells = f"{100 * found['found_at_10']:.1f}, {100 * found['found_at_20']:.1f}; {found['auroc']:.4f}"
                print(f"  {name:48} {cells}")


if __name__ == "__main__":
    main()
