"""Studies that take longer than a test; each one is a function below.

    python tests/studies/study.py symmetric --dataset cifar10
    python tests/studies/study.py asymmetric --dataset cifar10
    python tests/studies/study.py detection --dataset cifar10
    python tests/studies/study.py cleaning --dataset cifar10
    python tests/studies/study.py retraining --dataset cifar10
    python tests/studies/study.py factors --dataset cifar10

The first two write corrupted labels to `labels.csv`. For the others, each result is a line of
`results.jsonl`. A study that was stopped continues after its last result. At the end, it prints a
table of its results for each kind of machine.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from precision import spearman

import detect_mislabeled_dataset as detect
import pipeline
import train

FOLDER = Path(__file__).resolve().parent
# Kind of label noise, and the fraction of corrupted labels.
NOISES = (
    ("symmetric", 0.1),
    ("asymmetric", 0.2),
    ("symmetric", 0.05),
    ("symmetric", 0.2),
    ("symmetric", 0.4),
)
# The wrong label that asymmetric noise gives to an image of each class.
PARTNERS = {
    "airplane": "ship",
    "automobile": "truck",
    "bird": "airplane",
    "cat": "dog",
    "deer": "horse",
    "dog": "cat",
    "frog": "bird",
    "horse": "deer",
    "ship": "airplane",
    "truck": "automobile",
}
FIRST_SEED = 1004  # default seed of the scripts, for the training and for the pseudo-labels
HALVES_SEED = 18  # draws the random halves of the training images
CLEANED_FRACTIONS = (0.1, 0.15, 0.2)
LEFT_OUT_BY = ("aum_vote", "aum", "self_influence", "loss", "random")
CORRECTED_BY = ("aum_vote", "aum", "self_influence")
FACTOR_EXAMPLES = (20_000, 10_000, 5000, 2000, 1000, 500, 250, 100)
# Number of the most helpful images of a query that are compared: those by a fraction of the
# eigenvectors, with those by all eigenvectors.
NUM_HELPFUL = 10


@dataclass(frozen=True)
class Prediction:
    """How to compute scores that should predict retraining, and over which networks to average.

    models: number of trainings whose networks compute scores; trained_on: `all` images or `halves`;
    snapshots: how many networks of each training, the final one included.
    """

    strategy: str = "ekfac"
    damping_factor: float | str = 1e-6
    models: int = 1
    trained_on: str = "all"
    eigenvector_fraction: float = 1.0
    snapshots: int = 1


PREDICTIONS = [Prediction(strategy, 1e-8) for strategy in pipeline.STRATEGIES]
PREDICTIONS += [Prediction(damping_factor=damping) for damping in (1e-6, 1e-5, 1e-4, "heuristic")]
PREDICTIONS += [Prediction(models=models) for models in (3, 5, 10)]
PREDICTIONS += [Prediction(models=models, trained_on="halves") for models in (1, 3, 5, 10)]
PREDICTIONS += [
    Prediction(damping_factor=damping, eigenvector_fraction=fraction)
    for damping, fraction in product((1e-6, "heuristic"), (0.4, 0.2, 0.1, 0.05, 0.02))
]
PREDICTIONS += [
    Prediction(damping_factor=damping, eigenvector_fraction=fraction, snapshots=snapshots)
    for damping, fraction, snapshots in product((1e-6, "heuristic"), (1.0, 0.1), (2, 3))
]
PREDICTIONS += [Prediction(models=models, snapshots=3) for models in (3, 5)]


# ---- Results and networks ------------------------------------------------------------------------


class Store:
    """A folder that keeps results, one line each in `results.jsonl`, and intermediate arrays.

    rows: the results with these settings, also from other machines.
    """

    def __init__(self, folder, settings, machine):
        pipeline.make_folder(folder)
        self.folder = folder
        self.settings = settings
        self.machine = machine
        self.path = folder / "results.jsonl"
        self.rows = select(self.read_results(), settings)

    def read_results(self):
        """Returns all results in the file; deletes the last line if a study was stopped in it."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            del lines[-1]
            with pipeline.atomic_path(self.path) as temporary:
                temporary.write_text("".join(lines))
        return [json.loads(line) for line in lines]

    def complete(self, job, compute):
        """Returns the result of a job on this machine, a dictionary.

        If the result is missing, `compute()` makes it, and it is written to the file.
        """
        existing_rows = select(self.rows, job | self.machine)
        if existing_rows:
            return existing_rows[0]
        start = time.perf_counter()
        row = job | compute()
        row["seconds"] = time.perf_counter() - start
        row |= self.settings | self.machine
        row["environment"] = pipeline.environment(torch.device(self.machine["device"]))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(job, flush=True)
        return row

    def arrays(self, name, key, compute):
        """Returns a dictionary of arrays from a file; `key`, a list, identifies it.

        If the file is missing, `compute()` makes the arrays.
        """
        digest = pipeline.sha256(json.dumps([*key, self.settings, self.machine]))
        path = self.folder / f"{name}-{digest[:8]}.npz"
        if not path.exists():
            arrays = compute()
            with pipeline.atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
        with np.load(path) as arrays:
            return dict(arrays)


def select(rows, values):
    """Returns the rows that have all these values."""
    return [row for row in rows if values.items() <= row.items()]


@dataclass
class Trainer:
    """The images, and how networks are trained on them.

    clean: the training images with their true labels; test: the test split, on `device`.
    """

    clean: pipeline.ImageData
    test: pipeline.ImageData
    device: torch.device
    dtype: torch.dtype
    model_name: str
    recipe: train.Recipe

    def new_model(self, data):
        """Returns a network with random weights for the classes of `data`."""
        model = pipeline.construct_model(self.model_name, len(data.class_names))
        return model.to(self.device)

    def train(self, data, seed):
        """Trains as train.py does. Returns the network, the images' margins, and snapshots."""
        batch_size = self.recipe.train_batch_size
        if batch_size > len(data):
            reason = f"there are only {len(data)} images to train on"
            raise pipeline.UserError(f"argument --train_batch_size {batch_size}: {reason}")
        torch.manual_seed(seed)
        model = self.new_model(data)
        margins, snapshots = train.train(
            model,
            data.to(self.device),
            self.recipe,
            seed=seed,
            dtype=self.dtype,
        )
        return model, margins, snapshots

    def logits(self, model, data):
        """Returns the logits of images, float32 [N, num_classes], on the CPU."""
        return train.compute_logits(model, data.to(self.device), 1024, self.dtype).cpu()

    def accuracy(self, model):
        """Returns the test accuracy, from 0 to 1."""
        predicted = self.logits(model, self.test).argmax(1)
        return (predicted == self.test.labels.cpu()).float().mean().item()

    @contextlib.contextmanager
    def influence(self, model, data, strategy="ekfac", seed=FIRST_SEED, factor_examples="all"):
        """Yields an InfluenceRun; its factors and scores are deleted after the `with` block."""
        with tempfile.TemporaryDirectory() as folder:
            yield pipeline.InfluenceRun(
                model,
                data.to(self.device),
                Path(folder) / "model",
                strategy=strategy,
                dtype=self.dtype,
                seed=seed,
                seconds={},
                factor_examples=factor_examples,
            )


# ---- Label noise ---------------------------------------------------------------------------------


def corrupt(clean, noise=NOISES[0][0], fraction=NOISES[0][1], seed=pipeline.CORRUPTION_SEED):
    """Returns the images with a fraction of corrupted labels, ImageData.

    A corrupted label is a random other class (symmetric), or the partner of the class (asymmetric).
    """
    names = clean.class_names
    labels, is_corrupted = pipeline.corrupt_labels(clean.labels, fraction, len(names), seed)
    if noise == "asymmetric":
        partners = torch.tensor([partner_of(label, names) for label in range(len(names))])
        labels = torch.where(is_corrupted, partners[clean.labels], clean.labels)
    return replace(clean, labels=labels)


def partner_of(label, names):
    """Returns the corrupted label of asymmetric noise: from PARTNERS, or else the next class."""
    partner = PARTNERS.get(names[label])
    if partner in names:
        return names.index(partner)
    return (label + 1) % len(names)


def write_labels(trainer, store, args, *, noise):
    """Writes labels with a noise of NOISES to a file for `--noisy_labels`."""
    clean = trainer.clean
    kind, fraction = noise
    data = corrupt(clean, kind, fraction, args.corruption_seed)
    names = [clean.class_names[label] for label in data.labels]
    path = store.folder / "labels.csv"
    rows = zip(clean.dataset_indices.tolist(), clean.paths, names, strict=True)
    pipeline.write_table(path, ("index", "path", "label"), rows)
    print(f"wrote {path}")


# ---- What finds mislabeled images? ---------------------------------------------------------------


def detection(trainer, store, args):
    """Trains on corrupted labels, and measures the recall of each ranking.

    With `--folds`, the loss in a cross-validation is a further ranking.
    """
    for noise, fraction in NOISES[: args.num_noises]:
        for draw, turn in product(range(args.corruption_seeds), range(args.seeds)):
            case = {
                "noise": noise,
                "fraction": fraction,
                "corruption_seed": args.corruption_seed + draw,
                "seed": FIRST_SEED + turn,
            }
            complete_detection(trainer, store, case)
            for folds in args.folds:
                job = {"study": "cross_validation", "folds": folds, **case}
                store.complete(job, partial(cross_validation, trainer, folds, case))


def complete_detection(trainer, store, case):
    """Computes a detection unless the store has it. Returns test accuracy, and recall by ranking.

    case: a dictionary with noise, fraction, corruption_seed, and the seed of the training.
    """

    def compute():
        data = corrupted_for(trainer, case)
        scores = detection_scores(trainer, store, case)
        accuracy = float(scores.pop("test_accuracy"))
        return {"accuracy": accuracy, "methods": evaluate(scores, data)}

    return store.complete({"study": "detection", **case}, compute)


def corrupted_for(trainer, case):
    """Returns the images with the corrupted labels of a case, ImageData."""
    return corrupt(trainer.clean, case["noise"], case["fraction"], case["corruption_seed"])


def detection_scores(trainer, store, case):
    """Returns the suspicion [N] by ranking, and `test_accuracy`.

    The damping of `self_influence` is 1e-8; `self_influence, heuristic` has the heuristic damping.
    """

    def compute():
        data = corrupted_for(trainer, case)
        model, margins, _ = trainer.train(data, case["seed"])
        accuracy = trainer.accuracy(model)
        with trainer.influence(model, data) as run:
            metadata = {"margins": margins, "accuracy": {"test": accuracy}}
            signals, _, _ = detect.measure(run, metadata, 1e-8)
            heuristic, _ = run.self_influence("heuristic")
        scores = detect.suspicion_by_ranking([signals])
        scores["self_influence, heuristic"] = heuristic.numpy()
        return scores | {"test_accuracy": np.array(accuracy)}

    return store.arrays("scores", list(case.values()), compute)


def cross_validation(trainer, folds, case):
    """Evaluates the ranking by the loss of a network that was trained without the image's fold."""
    data = corrupted_for(trainer, case)
    losses = torch.zeros(len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(case["seed"]))
    for fold in order.chunk(folds):
        model, _, _ = trainer.train(data.without(fold), case["seed"])
        part = data.take(fold)
        logits = trainer.logits(model, part)
        losses[fold] = F.cross_entropy(logits, part.labels, reduction="none")
    return {"methods": evaluate({f"{folds}-fold cross-validation": losses.numpy()}, data)}


def evaluate(scores, data):
    """Returns recall, AUROC and average precision of scores [N] by name."""
    is_corrupted = data.is_corrupted.numpy()
    results = {}
    for name, values in scores.items():
        results[name] = detect.evaluate_ranking(values, is_corrupted)
        del results[name]["curve"]  # too long for a line of results.jsonl
    return results


def print_detection(rows, args):
    """Prints a table for each kind of noise, the highest mean average precision first."""
    rows = [row for row in rows if row["study"] in ("detection", "cross_validation")]
    noises = dict.fromkeys((row["noise"], row["fraction"]) for row in rows)
    for noise, fraction in noises:
        runs = select(rows, {"noise": noise, "fraction": fraction})
        detections = last_by_seeds(select(runs, {"study": "detection"}))
        accuracy = spread([100 * row["accuracy"] for row in detections], 1, " %")
        print(f"\n{100 * fraction:.0f} % {noise} noise, test accuracy {accuracy}\n")
        print("| ranking | recall at 10 % | recall at 20 % | AUROC | average precision | runs |")
        print("|---|---|---|---|---|---|")
        methods = dict.fromkeys(name for row in runs for name in row["methods"])
        lines = [detection_line(name, runs) for name in methods]
        for _, line in sorted(lines, reverse=True):
            print(line)


def detection_line(method, runs):
    """Returns the mean average precision of a ranking, and its line of the table."""
    runs_with_method = [row for row in runs if method in row["methods"]]
    results = [row["methods"][method] for row in last_by_seeds(runs_with_method)]
    cells = []
    for key in ("recall_at_10", "recall_at_20"):
        cells.append(spread([100 * result[key] for result in results], 1, " %"))
    for key in ("auroc", "average_precision"):
        cells.append(spread([result[key] for result in results], 3))
    mean_precision = statistics.mean(result["average_precision"] for result in results)
    return mean_precision, f"| {method} | {' | '.join(cells)} | {len(results)} |"


def last_by_seeds(rows):
    """Returns the rows; if several rows have the same seeds, only the last one."""
    rows_by_seeds = {}
    for row in rows:
        rows_by_seeds[row["corruption_seed"], row["seed"]] = row
    return list(rows_by_seeds.values())


# ---- What is cleaning worth? ---------------------------------------------------------------------


def cleaning(trainer, store, args):
    """Measures test accuracy with true labels, with corrupted labels, and after cleaning."""
    kinds = [{"labels": "true"}, {"labels": "corrupted"}]
    kinds.append({"labels": "left out", "by": "true labels", "fraction": NOISES[0][1]})
    for fraction in CLEANED_FRACTIONS:
        for by in LEFT_OUT_BY:
            kinds.append({"labels": "left out", "by": by, "fraction": fraction})
        for by in CORRECTED_BY:
            kinds.append({"labels": "corrected", "by": by, "fraction": fraction})
    for turn, kind in product(range(args.seeds), kinds):
        seed = FIRST_SEED + turn
        job = {"study": "cleaning", **kind, "seed": seed}
        store.complete(job, partial(cleaned_accuracy, trainer, store, seed, **kind))


def cleaned_accuracy(trainer, store, seed, labels, by=None, fraction=None):
    """Returns the test accuracy of a training.

    labels: `true`; `corrupted`; or the treatment of the top `fraction` of the ranking `by`:
    `left out` of the training, or `corrected` to the true labels.
    """
    if labels == "corrupted":
        return {"accuracy": complete_detection(trainer, store, cleaning_run(seed))["accuracy"]}
    data = trainer.clean
    if labels != "true":
        data = corrupt(trainer.clean)
        top = ranking(trainer, store, by, seed)[: round(fraction * len(data))]
        if labels == "corrected":
            true_labels = trainer.clean.labels[top]
            data = replace(data, labels=data.labels.index_put((top,), true_labels))
        else:
            data = data.without(top)
    model, _, _ = trainer.train(data, seed)
    return {"accuracy": trainer.accuracy(model)}


def cleaning_run(seed):
    """Returns the settings of the detection whose ranking the cleaning uses."""
    noise, fraction = NOISES[0]
    return {
        "noise": noise,
        "fraction": fraction,
        "corruption_seed": pipeline.CORRUPTION_SEED,
        "seed": seed,
    }


def ranking(trainer, store, by, seed):
    """Returns the indices of the training images, the most suspicious first, int64 [N]."""
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(trainer.clean), generator=generator)
    if by == "true labels":
        is_corrupted = corrupt(trainer.clean).is_corrupted
        return is_corrupted.int().argsort(descending=True, stable=True)
    scores = detection_scores(trainer, store, cleaning_run(seed))[by]
    return torch.from_numpy(np.argsort(-scores, kind="stable"))


def print_cleaning(rows, args):
    """Prints test accuracies, and the mean gain over the corrupted labels with the same seed."""
    rows = select(rows, {"study": "cleaning"})
    baselines = {}
    for row in select(rows, {"labels": "corrupted"}):
        baselines[row["seed"]] = 100 * row["accuracy"]
    print("\n| labels | ranked by | top | test accuracy | gain, points | seeds |")
    print("|---|---|---|---|---|---|")
    accuracies_by_kind = {}
    for row in rows:
        if row["seed"] in baselines:
            kind = row["labels"], row.get("by"), row.get("fraction")
            accuracies = accuracies_by_kind.setdefault(kind, {})
            accuracies[row["seed"]] = 100 * row["accuracy"]
    for kind, accuracies in accuracies_by_kind.items():
        print(cleaning_line(kind, accuracies, baselines))


def cleaning_line(kind, accuracies, baselines):
    """Returns a line of the table. kind: labels, ranking and fraction; the others: by seed."""
    labels, by, fraction = kind
    top = "" if fraction is None else f"{100 * fraction:.0f} %"
    accuracy = spread(list(accuracies.values()), 2, " %")
    gain = spread([value - baselines[seed] for seed, value in accuracies.items()], 2)
    return f"| {labels} | {by or ''} | {top} | {accuracy} | {gain} | {len(accuracies)} |"


# ---- Do scores predict retraining? ---------------------------------------------------------------


def retraining(trainer, store, args):
    """Measures how well scores predict the log-odds of networks that were trained on halves."""
    if args.halves < 2:
        reason = f"{args.halves} networks have no order to predict"
        raise pipeline.UserError(f"argument --halves: {reason}: give 50")
    for settings in PREDICTIONS:
        sizes = study_sizes(trainer, args)
        job = {"study": "retraining", **asdict(settings), **sizes}
        compute = partial(prediction, trainer, store, settings, **sizes)
        store.complete(job, compute)


def study_sizes(trainer, args):
    """Returns the number of queries, of halves, and of trainings on each half."""
    return {
        "num_queries": min(args.num_query_examples, len(trainer.test)),
        "halves": args.halves,
        "trainings": args.trainings,
    }


def prediction(trainer, store, settings, **sizes):
    """Returns a dictionary: `lds`, the linear datamodeling score (mean over queries), and others.

    settings: a Prediction. The scores are means over networks that were trained on all images, or
    on halves that are not among the predicted ones. The dictionary has:

    lds_by_half: the mean over every second query, and the mean over the other queries
    agreement: Spearman's correlation of two trainings on the same halves, or None
    gain: lds minus that of a baseline: the final networks of these trainings, all eigenvectors
    gain_error: the standard error of gain
    full_spearman, full_helpful: agreement with the scores by all eigenvectors
    """
    data = corrupt(trainer.clean)
    queries = trainer.test.take(torch.arange(sizes["num_queries"]))
    # A seed below FIRST_SEED is the number of the half to train on. The halves before number
    # sizes["halves"] are predicted, so networks that compute scores are trained on the next ones.
    first = FIRST_SEED if settings.trained_on == "all" else sizes["halves"]
    seeds = range(first, first + settings.models)
    scores, seconds = mean_scores(trainer, store, queries, seeds, settings)
    full, _ = mean_scores(
        trainer, store, queries, seeds, replace(settings, eigenvector_fraction=1.0)
    )
    baseline = replace(settings, eigenvector_fraction=1.0, snapshots=1)
    baseline_scores, _ = mean_scores(trainer, store, queries, seeds, baseline)
    members, log_odds = retrained(trainer, store, data, **sizes)
    measured = log_odds.mean(0)
    lds = linear_datamodeling_scores(scores, members, measured)
    gains = lds - linear_datamodeling_scores(baseline_scores, members, measured)
    agreement = None
    if len(log_odds) > 1:
        agreement = mean_spearman(log_odds[0].T, log_odds[1].T)
    return {
        "lds": lds.mean(),
        **spread_over_queries(lds),
        "gain": gains.mean(),
        "gain_error": standard_error(gains),
        "agreement": agreement,
        "full_spearman": mean_spearman(scores, full),
        "full_helpful": shared_helpful(scores, full),
        "seconds_of_scores": seconds,
    }


def spread_over_queries(lds):
    """Returns how much the linear datamodeling score, float64 [Q], differs between queries."""
    by_query_half = []
    if len(lds) > 1:
        by_query_half = [lds[::2].mean(), lds[1::2].mean()]
    return {"lds_by_half": by_query_half, "standard_error": standard_error(lds)}


def standard_error(values):
    """Returns the standard error of the mean of values [N], 0 for a single one."""
    if len(values) == 1:
        return 0.0
    return values.std(ddof=1) / len(values) ** 0.5


def mean_scores(trainer, store, queries, seeds, settings):
    """Returns the mean scores, float32 [num_query, num_train], over networks, and seconds.

    seeds: those of the trainings; settings: a Prediction.
    """
    found = []
    for seed, back in product(seeds, range(settings.snapshots)):
        compute = partial(pairwise, trainer, store, queries, settings, seed, back)
        key = [corrupt(trainer.clean).digest, queries.digest, settings.strategy]
        key += [settings.damping_factor, settings.eigenvector_fraction, seed, back]
        found.append(store.arrays("pairwise", key, compute))
    scores = np.mean([each["scores"] for each in found], axis=0)
    return scores, float(sum(each["seconds"] for each in found))


def shared_helpful(scores, others):
    """Returns how many of a query's ten most helpful images two arrays [Q, N] share, on average."""
    counts = []
    for pair in zip(scores, others, strict=True):
        first, second = (set(np.argsort(-values)[:NUM_HELPFUL].tolist()) for values in pair)
        counts.append(len(first & second))
    return float(np.mean(counts))


def pairwise(trainer, store, queries, settings, seed, back):
    """Returns `scores`, float32 [num_query, num_train], of a network of a training, and `seconds`.

    The seconds are those of the scores, without the factors. A seed below FIRST_SEED is the number
    of the half that it is trained on. back: 0 for the final network, 1 for the one that was kept
    before it, and so on.
    """
    data = corrupt(trainer.clean)
    trained_on = data if seed >= FIRST_SEED else data.take(half_of(len(data), seed))
    model = trained_model(trainer, store, trained_on, seed, back)
    with trainer.influence(model, data, strategy=settings.strategy) as run:
        scores, _ = run.pairwise_influence(
            queries, 1000, settings.damping_factor, settings.eigenvector_fraction
        )
    return {"scores": scores.numpy(), "seconds": np.array(run.seconds["scores"])}


def trained_model(trainer, store, data, seed, back=0):
    """Returns a network of a training in eval mode; it is trained once.

    back: 0 for the final one, 1 for the one that was kept before it, and so on.
    """

    def compute():
        model, _, snapshots = trainer.train(data, seed)
        networks = [*snapshots.values(), train.copy_weights(model)]
        arrays = {}
        for number, weights in enumerate(reversed(networks)):
            arrays |= {f"{number} {name}": tensor.numpy() for name, tensor in weights.items()}
        return arrays

    arrays = store.arrays("networks", [data.digest, seed], compute)
    weights = {}
    for key, array in arrays.items():
        number, _, name = key.partition(" ")
        if number == str(back):
            weights[name] = torch.from_numpy(array)
    if not weights:
        reason = f"a training keeps fewer than {back + 1} networks"
        raise pipeline.UserError(f"argument --num_train_epochs: {reason}: give at least 4")
    model = trainer.new_model(data)
    model.load_state_dict(weights)
    return model.eval()


def half_of(total, half_index):
    """Returns the sorted indices of a random half of `total` images, int64 [total / 2]."""
    order = np.random.default_rng((HALVES_SEED, half_index)).permutation(total)
    return torch.from_numpy(np.sort(order[: round(total / 2)]))


def retrained(trainer, store, data, *, num_queries, halves, trainings):
    """Trains `trainings` times on each half, each time with another seed.

    Returns which images each half contains, bool [halves, N], and the log-odds of the queries,
    float32 [trainings, halves, num_queries].
    """
    queries = trainer.test.take(torch.arange(num_queries)).to("cpu")
    members = np.zeros((halves, len(data)), bool)
    log_odds = np.zeros((trainings, halves, num_queries), np.float32)
    turns = list(product(range(trainings), range(halves)))
    for turn, half_index in tqdm(turns, "Halves", leave=False):
        half = half_of(len(data), half_index)
        seed = half_index + turn * FIRST_SEED
        members[half_index, half] = True
        compute = partial(half_log_odds, trainer, data.take(half), queries, seed)
        key = [data.digest, queries.digest, half_index, seed]
        log_odds[turn, half_index] = store.arrays("half-log-odds", key, compute)["log_odds"]
    return members, log_odds


def half_log_odds(trainer, half, queries, seed):
    """Trains on a half of the images. Returns `log_odds`: the log-odds of queries, [num_query]."""
    model, _, _ = trainer.train(half, seed)
    return {"log_odds": pipeline.log_odds(trainer.logits(model, queries), queries.labels).numpy()}


def linear_datamodeling_scores(scores, members, log_odds):
    """Returns the linear datamodeling score of each query, float64 [Q].

    It is Spearman's correlation over M retrained networks between two values: the log-odds of the
    query's label, and the sum of the query's scores over the training images of the network (Park
    et al. 2023, "TRAK", section 2). It is 0 if one of the values is the same for all networks.
    scores: [Q, N]; members: which images each network was trained on, bool [M, N]; log_odds: [M, Q]
    """
    sums = members.astype(float) @ scores.astype(float).T  # (M, Q)
    with np.errstate(invalid="ignore"):  # the correlation with a constant is 0 / 0
        lds = [
            spearman(predicted, measured)
            for predicted, measured in zip(sums.T, log_odds.T, strict=True)
        ]
    return np.nan_to_num(lds)


def mean_spearman(first, second):
    """Returns Spearman's correlation of two arrays [M, N], the mean over their rows."""
    correlations = [spearman(row, other) for row, other in zip(first, second, strict=True)]
    return float(np.mean(correlations))


def print_retraining(rows, args):
    """Prints linear datamodeling scores (LDS); ± is the standard error over queries."""
    rows = select(rows, {"study": "retraining", "halves": args.halves, "trainings": args.trainings})
    columns = ["queries", "strategy", "eigenvectors", "damping"]
    columns += ["scoring trainings", "trained on", "networks of each"]
    columns += [
        "LDS",
        "by half of the queries",
        "gain",
        "Spearman with all",
        "ten most helpful",
        "seconds of scores",
    ]
    print(f"\n| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for row in rows:
        cells = [row["num_queries"], row["strategy"], f"{100 * row['eigenvector_fraction']:.0f} %"]
        cells += [row["damping_factor"], row["models"], row["trained_on"], row["snapshots"]]
        cells.append(f"{row['lds']:.3f} ± {row['standard_error']:.3f}")
        cells.append(", ".join(f"{value:.3f}" for value in row["lds_by_half"]))
        cells.append(f"{row['gain']:+.4f} ± {row['gain_error']:.4f}" if "gain" in row else "")
        cells += [f"{row['full_spearman']:.3f}", f"{row['full_helpful']:.1f}"]
        # Earlier rows have `score_seconds`, which include the seconds of the factors.
        seconds = row.get("seconds_of_scores")
        cells.append("" if seconds is None else f"{seconds:.0f}")
        print(f"| {' | '.join(map(str, cells))} |")
    if rows and rows[0].get("agreement"):
        agreement = f"{rows[0]['agreement']:.3f}"
        print(f"Spearman's correlation of two trainings on the same half is {agreement}.")


# ---- How many images do the factors need? --------------------------------------------------------


def factors(trainer, store, args):
    """Compares scores by factors of some images with scores by factors of all images."""
    if args.halves == 1:
        raise pipeline.UserError(
            "argument --halves: 1 network has no order to predict: give 0 or 50"
        )
    settings = [("all", FIRST_SEED), ("all", FIRST_SEED + 1)]
    for examples in FACTOR_EXAMPLES:
        if examples < len(trainer.clean):
            settings.append((examples, FIRST_SEED))
    for examples, seed in settings:
        sizes = study_sizes(trainer, args)
        job = {"study": "factors", "examples": examples, "pseudo_label_seed": seed, **sizes}
        store.complete(job, partial(factor_agreement, trainer, store, examples, seed, **sizes))


def factor_agreement(trainer, store, examples, seed, **sizes):
    """Returns the agreement with scores by factors of all images, the recall, and the LDS.

    examples: number of images that the factors are fitted on, or "all".
    """
    data = corrupt(trainer.clean)
    queries = trainer.test.take(torch.arange(sizes["num_queries"]))
    model = trained_model(trainer, store, data, FIRST_SEED)

    def compute(examples, seed):
        return factor_scores(trainer, model, data, queries, examples, seed)

    key = [data.digest, queries.digest]
    reference = store.arrays("full", key, partial(compute, "all", FIRST_SEED))
    scores = reference
    if examples != "all" or seed != FIRST_SEED:
        scores = compute(examples, seed)
    result = evaluate({"self_influence": scores["self"]}, data)["self_influence"]
    result["factor_seconds"] = float(scores["seconds"])
    result["self_spearman"] = spearman(scores["self"], reference["self"])
    result["pairwise_spearman"] = mean_spearman(scores["pairwise"], reference["pairwise"])
    if sizes["halves"]:
        members, log_odds = retrained(trainer, store, data, **sizes)
        lds = linear_datamodeling_scores(scores["pairwise"], members, log_odds.mean(0))
        result["lds"] = lds.mean()
    return result


def factor_scores(trainer, model, data, queries, examples, seed):
    """Returns `self` (self-influence), `pairwise` scores, and `seconds` for the factors."""
    with trainer.influence(model, data, seed=seed, factor_examples=examples) as run:
        self_influence, _ = run.self_influence("heuristic")
        scores, _ = run.pairwise_influence(queries, 1000, "heuristic")
    seconds = sum(run.seconds[name] for name in ("covariance", "eigendecomposition", "lambda"))
    return {
        "self": self_influence.numpy(),
        "pairwise": scores.numpy(),
        "seconds": np.array(seconds),
    }


def print_factors(rows, args):
    """Prints the agreement with scores by factors of all images, the recall, and the LDS."""
    rows = select(rows, {"study": "factors", "halves": args.halves, "trainings": args.trainings})
    columns = ["queries", "factors of", "pairwise Spearman", "self-influence Spearman"]
    columns += ["recall at 10, 20 %", "AUROC", "LDS", "seconds"]
    print(f"\n| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for row in rows:
        name = str(row["examples"])
        if row["pseudo_label_seed"] != FIRST_SEED:
            name += ", other pseudo-labels"
        cells = [
            row["num_queries"],
            name,
            f"{row['pairwise_spearman']:.4f}",
            f"{row['self_spearman']:.5f}",
        ]
        cells.append(f"{100 * row['recall_at_10']:.1f}, {100 * row['recall_at_20']:.1f} %")
        cells.append(f"{row['auroc']:.4f}")
        cells.append(f"{row['lds']:.3f}" if "lds" in row else "")
        cells.append(f"{row['factor_seconds']:.1f}")
        print(f"| {' | '.join(map(str, cells))} |")


# ---- Command line --------------------------------------------------------------------------------


def spread(values, digits, unit=""):
    """Returns mean ± standard deviation as text; for a single value, only the value."""
    if not values:
        return "not measured"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean}{unit}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}{unit}"


# For each study, the function that computes it, and the function that prints its table.
STUDIES = {
    "symmetric": (partial(write_labels, noise=NOISES[0]), None),
    "asymmetric": (partial(write_labels, noise=NOISES[1]), None),
    "detection": (detection, print_detection),
    "cleaning": (cleaning, print_cleaning),
    "retraining": (retraining, print_retraining),
    "factors": (factors, print_factors),
}


def parse_arguments():
    """Reads the command line."""
    parser = pipeline.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES, help="study to run")
    add_training_flags(parser.add_argument_group("data and training").add_argument)
    flag = parser.add_argument_group("study").add_argument
    add_detection_flags(flag)
    add_retraining_flags(flag)
    flag(
        "--folder",
        type=Path,
        default=FOLDER,
        help="directory for results.jsonl and for intermediate arrays",
    )
    return parser.parse_args()


def add_detection_flags(flag):
    """Adds the seeds, draws and noises; `flag` is add_argument of a group."""
    count = pipeline.whole_number
    up_to_100 = pipeline.number(int, "a number from 0 to 100", lambda value: 0 <= value <= 100)
    folds = pipeline.number(int, "a number of folds of at least 2", lambda value: value >= 2)
    # In a detection, corruption and training never have the same seed: the largest seed of a
    # corruption is 899 + 99, below FIRST_SEED. With the same seed, the first batches would hold all
    # corrupted labels.
    up_to_899 = pipeline.number(int, "a seed from 0 to 899", lambda value: 0 <= value < 900)
    flag(
        "--seeds",
        type=count,
        default=3,
        metavar="N",
        help="number of training seeds; 0 prints the existing results",
    )
    flag(
        "--corruption_seeds",
        type=up_to_100,
        default=3,
        metavar="N",
        help="number of draws of the corrupted labels, at most 100",
    )
    flag(
        "--corruption_seed",
        type=up_to_899,
        default=pipeline.CORRUPTION_SEED,
        metavar="N",
        help="seed of the first draw of the corrupted labels: symmetric, asymmetric, detection",
    )
    flag(
        "--num_noises",
        type=count,
        default=len(NOISES),
        metavar="N",
        help=f"use only the first N of {NOISES}",
    )
    flag("--folds", type=folds, nargs="*", default=[], help="cross-validations to run, such as 2 5")


def add_retraining_flags(flag):
    """Adds the numbers of queries and of retrainings; `flag` is add_argument of a group."""
    positive = pipeline.positive_int
    # The first training on half i has the seed i, which must be below FIRST_SEED. After the
    # predicted halves, up to ten more are used, to train the networks that compute scores.
    up_to_900 = pipeline.number(int, "a number from 0 to 900", lambda value: 0 <= value <= 900)
    flag(
        "--num_query_examples",
        type=positive,
        default=200,
        metavar="N",
        help="number of test images to use as queries",
    )
    flag(
        "--halves",
        type=up_to_900,
        default=50,
        metavar="N",
        help="number of halves to retrain on; 0 skips the retraining in the study of factors",
    )
    flag(
        "--trainings",
        type=positive,
        default=1,
        metavar="N",
        help="number of trainings on each half; the mean of their log-odds is predicted",
    )


def add_training_flags(flag):
    """Adds the flags for data and training; `flag` is add_argument of a group."""
    positive = pipeline.positive_int
    flag("--dataset", choices=pipeline.LOADERS, default="synthetic", help="data set to train on")
    flag("--dataset_dir", default="./data", help="directory of the data set")
    flag("--num_train_examples", type=positive, metavar="N", help="use N images (default: all)")
    flag("--model", choices=pipeline.MODELS, default="resnet9", help="network to train")
    flag("--recipe", choices=train.RECIPES, default="published", help="how to train")
    flag("--train_batch_size", type=positive, metavar="N", help="images per step")
    flag("--num_train_epochs", type=positive, metavar="N", help="passes over the data")
    flag("--learning_rate", type=train.positive_float, metavar="X", help="peak of the schedule")
    flag("--weight_decay", type=pipeline.non_negative_float, metavar="X", help="L2 penalty")


def load(args):
    """Returns the trainer and the store of the images and settings in `args`."""
    device = pipeline.choose_device("auto", several_processes=False)
    dtype = pipeline.configure_precision("auto", device)
    folder = args.folder
    pipeline.make_folder(folder)
    load_split = partial(pipeline.load_data, args.dataset, args.dataset_dir, cache_dir=folder)
    clean = load_split("train", args.num_train_examples)
    test = load_split("test")
    recipe = train.choose_recipe(args)
    settings = {
        "dataset": args.dataset,
        "num_train_examples": args.num_train_examples,
        "model": args.model,
        "recipe": args.recipe,
        **train.hyperparameters_of(recipe),
        "images": pipeline.sha256(clean.images, clean.labels, test.images)[:8],
    }
    machine = {"device": device.type, "precision": str(dtype).removeprefix("torch.")}
    trainer = Trainer(clean, test.to(device), device, dtype, args.model, recipe)
    return trainer, Store(folder, settings, machine)


def main():
    """Parses, computes the missing results, and prints the tables.

    The tables are printed even if an error or Ctrl-C stops the study.
    """
    args = parse_arguments()
    trainer, store = load(args)
    compute, print_table = STUDIES[args.study]
    try:
        if args.seeds:
            compute(trainer, store, args)
    finally:
        if print_table:
            print_tables(store, print_table, args)


def print_tables(store, print_table, args):
    """Prints the table of a study for each device and precision."""
    machines = {(row["device"], row["precision"]) for row in store.rows}
    if not machines:
        print(f"{store.path} has no results with the settings {store.settings}")
    for device, precision in sorted(machines):
        print(f"\nMeasured on {device} in {precision}:")
        print_table(select(store.rows, {"device": device, "precision": precision}), args)


if __name__ == "__main__":
    pipeline.run(main)
