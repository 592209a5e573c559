"""Studies too long for a test: of detection, of cleaning, of retraining, and of how many images the factors need.

    python tests/studies/study.py similar --dataset cifar10
    python tests/studies/study.py detection --dataset cifar10
    python tests/studies/study.py cleaning --dataset cifar10
    python tests/studies/study.py retraining --dataset cifar10
    python tests/studies/study.py factors --dataset cifar10

`similar` writes labels of which a fifth are wrong, each by a class that looks like the right one, for `--noisy_labels`.
`detection` trains on labels that are wrong at random, and compares all methods and, with `--folds`, the loss of images
held out in a cross-validation. `cleaning` trains on true labels, on wrong ones, and on what is left of these without
the top of a ranking or with that put right. `retraining` trains on random halves, and says how well scores predict the
margins of these networks: the linear datamodeling score. `factors` fits the curvature on ever fewer of the training
images, and compares the scores with those by all of them. Every result is a line in a file; a study that was stopped
goes on where it was, and a table of what is there, for each kind of machine, ends each run.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import chain, product
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

NOISES = (("uniform", 0.1), ("uniform", 0.05), ("uniform", 0.2), ("uniform", 0.4))
SIMILAR = {
    **{
        "cat": "dog",
        "dog": "cat",
        "truck": "automobile",
        "automobile": "truck",
        "deer": "horse",
        "horse": "deer",
    },
    **{"airplane": "ship", "ship": "airplane", "bird": "airplane", "frog": "bird"},
}
SIMILAR_FRACTION = 0.2
FOLDER = Path(__file__).resolve().parent
FRACTIONS = (0.1, 0.15, 0.2)
RANKINGS = (
    "aum_vote",
    "aum",
    "self_influence",
    "loss",
    "random",
)  # and, of just the wrong ones, "truth"
FACTOR_EXAMPLES = (20_000, 10_000, 5000, 2000, 1000, 500, 250, 100)
FIRST_SEED = 1004  # of the training and of the pseudo-labels, as the scripts have it
HALVES_SEED = 18
# Strategy, damping, of how many networks the mean is taken, and on what these were trained.
PREDICTIONS = [(strategy, 1e-8, 1, "all") for strategy in pipeline.STRATEGIES]
PREDICTIONS += [("ekfac", damping, 1, "all") for damping in (1e-6, 1e-5, 1e-4, None)]
PREDICTIONS += [("ekfac", 1e-6, models, "all") for models in (3, 5, 10)]
PREDICTIONS += [("ekfac", 1e-6, models, "halves") for models in (1, 3, 5, 10)]


class Study:
    """Images, recipe, and the results that are there of these, in `<folder>/results.jsonl`.

    `rows` are those of any machine, and `machine`, at first this one, is the kind whose rows count.
    """

    def __init__(self, args):
        self.args, self.folder = args, args.folder
        pipeline.make_folder(self.folder)
        self.device = pipeline.choose_device("auto", several_processes=False)
        self.dtype = pipeline.configure_precision("auto", self.device)
        place = args.dataset, args.dataset_dir
        self.clean = pipeline.load_data(*place, "train", args.num_train_examples, self.folder)
        self.test = pipeline.load_data(*place, "test", cache_dir=self.folder).to(self.device)
        settings = {"dataset": args.dataset, "num_train_examples": args.num_train_examples}
        self.recipe = {name: getattr(args, name) for name in train.RECIPE}
        settings |= self.recipe
        settings["images"] = pipeline.sha256(
            self.clean.images, self.clean.labels, self.test.images
        )[:8]
        self.machine = {
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
        }
        self.asked = settings | self.machine
        self.path = self.folder / "results.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # it was stopped while writing this one
            del lines[-1]
            with pipeline.atomic_path(self.path) as temporary:
                temporary.write_text("".join(lines))
        self.rows = [row for row in map(json.loads, lines) if settings.items() <= row.items()]

    def complete(self, jobs):
        """Writes and keeps a row for each job, a dictionary, that the method its `study` names has still to compute."""
        for job in jobs:
            if not self.found(job):
                start = time.perf_counter()
                found = getattr(self, job["study"])(
                    **{name: value for name, value in job.items() if name != "study"}
                )
                row = job | found | {"seconds": time.perf_counter() - start} | self.asked
                row |= {"environment": pipeline.environment(self.device)}
                with self.path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                self.rows.append(row)
                print(job, flush=True)

    def found(self, job):
        """Returns the rows by `machine` of a job, or of all that share these of its settings."""
        return [row for row in self.rows if (job | self.machine).items() <= row.items()]

    def train(self, data, seed):
        """Trains as train.py does. Returns the model and the margins of each image by epoch."""
        if self.args.train_batch_size > len(data):
            raise pipeline.UserError(
                f"argument --train_batch_size: there are only {len(data)} images to train on"
            )
        torch.manual_seed(seed)
        model = pipeline.construct_model("resnet9", len(data.class_names)).to(self.device)
        return model, train.train(
            model, data.to(self.device), **self.recipe, seed=seed, dtype=self.dtype
        )

    def logits(self, model, data):
        """Returns the logits of images, float32 [N, num_classes], on the CPU."""
        return train.compute_logits(model, data.to(self.device), 1024, self.dtype).cpu()

    def accuracy(self, model):
        """Returns the accuracy on the test images, from 0 to 1."""
        return (
            (self.logits(model, self.test).argmax(1) == self.test.labels.cpu())
            .float()
            .mean()
            .item()
        )

    @contextlib.contextmanager
    def influence(self, data, strategy="ekfac"):
        """Yields what makes an InfluenceRun of a model on `data`, in a folder for the time being."""
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "strategy": strategy,
                "dtype": self.dtype,
                "seed": FIRST_SEED,
                "seconds": {},
            }
            yield partial(
                pipeline.InfluenceRun,
                data=data.to(self.device),
                path=Path(folder) / "model",
                **settings,
            )

    # ----------------------------------------------------------------------------------------------
    # What finds mislabeled images
    # ----------------------------------------------------------------------------------------------

    def detection(self, noise, fraction, corruption_seed, seed):
        """Trains on wrong labels and keeps the scores by every ranking in a file. Returns what each finds.

        Self-influence is at a damping of 1e-8, or where it says so at the heuristic one.
        """
        data = wrong_labels(self.clean, fraction, corruption_seed)
        model, margins = self.train(data, seed)
        accuracy = self.accuracy(model)
        with self.influence(data) as make_run:
            run = make_run(model)
            measured, _, _ = detect.measure(
                run, {"margins": margins, "accuracy": {"test": accuracy}}, 1e-8
            )
            heuristic, _ = run.self_influence(None)
            scores = detect.rank([measured]) | {"self_influence, heuristic": heuristic.numpy()}
        save(self.scores_path(noise, fraction, corruption_seed, seed), **scores)
        return {"accuracy": accuracy, "methods": figures(scores, data.is_corrupted.numpy())}

    def scores_path(self, *job):
        """Returns the file with the scores of a run of `detection`."""
        return self.folder / f"scores-{pipeline.sha256(json.dumps([*job, self.asked]))[:8]}.npz"

    def cross_validation(self, folds, noise, fraction, corruption_seed, seed):
        """Ranks each image by its loss on a network that was trained without its fold. Returns what that finds."""
        data = wrong_labels(self.clean, fraction, corruption_seed)
        losses = torch.zeros(len(data))
        for held_out in torch.randperm(
            len(data), generator=torch.Generator().manual_seed(seed)
        ).chunk(folds):
            model, _ = self.train(data.without(held_out), seed)
            part = data.take(held_out)
            losses[held_out] = F.cross_entropy(
                self.logits(model, part), part.labels, reduction="none"
            )
        scores = {f"{folds}-fold cross-validation": losses.numpy()}
        return {"methods": figures(scores, data.is_corrupted.numpy())}

    # ----------------------------------------------------------------------------------------------
    # What cleaning is worth
    # ----------------------------------------------------------------------------------------------

    def cleaning(self, labels, seed, by=None, fraction=None):
        """Returns the accuracy of a training on the true labels, on corrupted ones, or on what was cleaned of these.

        Of the top `fraction` of the ranking by `by`, the images are left out, or the wrong labels are put right.
        """
        data = wrong_labels(self.clean)
        if labels == "corrupted":
            return {"accuracy": self.detected(seed)["accuracy"]}
        if labels == "true":
            data = self.clean
        else:
            top = self.ranking(by, seed)[: round(fraction * len(data))]
            if labels == "put right":
                data = replace(data, labels=data.labels.index_put((top,), self.clean.labels[top]))
            else:
                data = data.without(top)
        return {"accuracy": self.accuracy(self.train(data, seed)[0])}

    def ranking(self, by, seed):
        """Returns the training images in order of falling suspicion, int64 [N]."""
        if by == "random":
            return torch.randperm(len(self.clean), generator=torch.Generator().manual_seed(seed))
        if by == "truth":
            data = wrong_labels(self.clean)
            return data.is_corrupted.int().argsort(descending=True, stable=True)
        self.detected(seed)
        path = self.scores_path(*NOISES[0], pipeline.CORRUPTION_SEED, seed)
        if not path.exists() or by not in np.load(
            path
        ):  # of a study that goes on with the results alone
            self.detection(*NOISES[0], pipeline.CORRUPTION_SEED, seed)
        with np.load(path) as scores:
            return torch.from_numpy(np.argsort(-scores[by], kind="stable"))

    def detected(self, seed):
        """Returns the row of the detection among the labels that the cleaning starts from."""
        job = {"study": "detection", **noisy_run(*NOISES[0], pipeline.CORRUPTION_SEED, seed)}
        self.complete([job])
        return self.found(job)[0]

    # ----------------------------------------------------------------------------------------------
    # Whether scores predict retraining, and how many images factors need
    # ----------------------------------------------------------------------------------------------

    def kept(self, name, compute, *settings):
        """Returns the arrays by name in a file of the folder, which `compute()` makes where it is not there."""
        path = (
            self.folder / f"{name}-{pipeline.sha256(json.dumps([*settings, self.asked]))[:8]}.npz"
        )
        if not path.exists():
            save(path, **compute())
        with np.load(path) as arrays:
            return dict(arrays)

    def model(self, data, seed):
        """Returns the network of a seed in eval mode, trained once."""

        def weights():
            return {
                name: tensor.cpu().numpy()
                for name, tensor in self.train(data, seed)[0].state_dict().items()
            }

        model = pipeline.construct_model("resnet9", len(data.class_names)).to(self.device)
        found = self.kept("model", weights, data.digest, seed)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})
        return model.eval()

    def half(self, data, queries, number, seed):
        """Trains on a random half of the images. Returns which, bool [N], and its margins on queries, [num_query]."""
        half, chosen = half_of(data, number)
        model, _ = self.train(half, seed)
        return {
            "trained_on": chosen,
            "margins": pipeline.margin(self.logits(model, queries), queries.labels).numpy(),
        }

    def retrained(self, data, queries, halves, trainings):
        """Trains so many times on each half.

        Returns which images a half has, bool [halves, N], and margins on queries, float32 [trainings, halves, Q].
        """
        found = []
        for turn, number in tqdm(
            [*product(range(trainings), range(halves))], "Halves", leave=False
        ):
            settings = data.digest, queries.digest, number, number + turn * FIRST_SEED
            found.append(
                self.kept("half", partial(self.half, data, queries, *settings[2:]), *settings)
            )
        margins = np.stack([each["margins"] for each in found])
        return np.stack([each["trained_on"] for each in found[:halves]]), margins.reshape(
            trainings, halves, -1
        )

    def pairwise(self, data, queries, strategy, damping_factor, seed):
        """Scores queries by the network of a seed, or below FIRST_SEED of the half of that number.

        Returns the scores, float32 [num_query, num_train], and seconds. Factors and scores are of all images.
        """
        model = self.model(data if seed >= FIRST_SEED else half_of(data, seed)[0], seed)
        with self.influence(data, strategy=strategy) as make_run:
            run = make_run(model)
            scores, _ = run.pairwise_influence(queries, 1000, damping_factor)
        return {"scores": scores.numpy(), "seconds": np.array(sum(run.seconds.values()))}

    def retraining(
        self, strategy, damping_factor, models, trained_on, num_queries, halves, trainings
    ):
        """Scores queries by the mean of some networks, of all images or of halves that are not predicted.

        Returns the mean linear datamodeling score, its error, the means of every other query and of the rest, and how
        well two trainings of a half agree, by Spearman's correlation over the halves; None of a single one.
        """
        data, queries, found = (
            wrong_labels(self.clean),
            self.test.take(torch.arange(num_queries)),
            [],
        )
        first = FIRST_SEED if trained_on == "all" else halves
        for seed in range(first, first + models):
            compute = partial(self.pairwise, data, queries, strategy, damping_factor, seed)
            settings = data.digest, queries.digest, strategy, damping_factor, seed
            found.append(self.kept("pairwise", compute, *settings))
        scores = torch.from_numpy(np.mean([each["scores"] for each in found], axis=0))
        chosen, margins = self.retrained(data, queries.to("cpu"), halves, trainings)
        values = linear_datamodeling_scores(scores, chosen, margins.mean(0))
        agreement = mean_spearman(*margins[:2].swapaxes(1, 2)) if trainings > 1 else None
        parts = [values[::2].mean(), values[1::2].mean()] if len(values) > 1 else []
        seconds = float(sum(each["seconds"] for each in found))
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        result = {"lds": values.mean(), "lds_by_half": parts, "standard_error": error}
        return result | {"agreement": agreement, "score_seconds": seconds}

    def factors(self, examples, pseudo_label_seed, num_queries, halves, trainings):
        """Scores by factors of some images, None for all. Returns agreement with all, what it finds, seconds."""
        data = wrong_labels(self.clean)
        queries, model = self.test.take(torch.arange(num_queries)), self.model(data, FIRST_SEED)

        def score(examples=None, seed=FIRST_SEED):
            with self.influence(data) as make_run:
                run = make_run(model, factor_examples=examples, seed=seed)
                scores = (
                    run.self_influence(None)[0].numpy(),
                    run.pairwise_influence(queries, 1000, None)[0].numpy(),
                )
            seconds = sum(
                run.seconds[name] for name in ("covariance", "eigendecomposition", "lambda")
            )
            return {"self": scores[0], "pairwise": scores[1], "seconds": np.array(seconds)}

        full = self.kept("full", score, data.digest, queries.digest)
        first = examples is None and pseudo_label_seed == FIRST_SEED
        own = full if first else score(examples, pseudo_label_seed)
        found = figures({"self_influence": own["self"]}, data.is_corrupted.numpy())[
            "self_influence"
        ]
        found |= {
            "factor_seconds": float(own["seconds"]),
            "self_spearman": spearman(own["self"], full["self"]),
        }
        found["pairwise_spearman"] = mean_spearman(own["pairwise"], full["pairwise"])
        if halves:
            chosen, margins = self.retrained(data, queries.to("cpu"), halves, trainings)
            found["lds"] = linear_datamodeling_scores(
                torch.from_numpy(own["pairwise"]), chosen, margins.mean(0)
            ).mean()
        return found


def linear_datamodeling_scores(scores, trained_on, margins):
    """Returns the linear datamodeling score of each query, float64 [num_query] (Park et al. 2023, "TRAK", section 2).

    That is Spearman's correlation, over retrained networks, of a query's margin, margins [M, num_query], and the sum of
    its scores [num_query, num_train] over the images which that network was trained on, trained_on [M, num_train];
    0 where one of them is the same for all networks.
    """
    predicted = trained_on.astype(float) @ scores.double().numpy().T  # (M, num_query)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num([spearman(*pair) for pair in zip(predicted.T, margins.T, strict=True)])


def mean_spearman(first, second):
    """Returns the mean, over the rows of two arrays [M, N], of Spearman's correlation."""
    return float(np.mean([spearman(*pair) for pair in zip(first, second, strict=True)]))


def half_of(data, number):
    """Returns a random half of the images, ImageData, and which these are, bool [N]."""
    order = np.random.default_rng((HALVES_SEED, number)).permutation(len(data))
    chosen = np.zeros(len(data), bool)
    chosen[order[: round(len(data) / 2)]] = True
    return data.take(torch.from_numpy(chosen.nonzero()[0])), chosen


def wrong_labels(clean, fraction=NOISES[0][1], seed=pipeline.CORRUPTION_SEED):
    """Returns the images with a fraction of labels that are wrong at random, ImageData."""
    labels, _ = pipeline.corrupt_labels(clean.labels, fraction, len(clean.class_names), seed)
    return replace(clean, labels=labels)


def similar_labels(clean):
    """Returns class names, [N]: a fifth of them, drawn at random, the class of SIMILAR or else the next one."""
    names = clean.class_names
    partners = {name: names[(place + 1) % len(names)] for place, name in enumerate(names)}
    partners |= {name: other for name, other in SIMILAR.items() if name in names and other in names}
    is_corrupted = wrong_labels(clean, SIMILAR_FRACTION).is_corrupted.tolist()
    true = [names[label] for label in clean.labels]
    return [
        partners[name] if wrong else name for name, wrong in zip(true, is_corrupted, strict=True)
    ]


def write_similar_labels(study):
    """Writes the labels of `similar_labels` to a csv file for `--noisy_labels`."""
    path, clean = study.folder / "labels.csv", study.clean
    rows = zip(clean.numbers.tolist(), clean.paths, similar_labels(clean), strict=True)
    pipeline.write_table(path, ("index", "path", "label"), rows)
    print(f"wrote {path}")


def figures(scores, is_corrupted):
    """Returns what each method finds, without the curve."""
    rankings = {
        name: detect.evaluate_ranking(values, is_corrupted) for name, values in scores.items()
    }
    return {
        name: {key: value for key, value in row.items() if key != "curve"}
        for name, row in rankings.items()
    }


def save(path, **arrays):
    """Writes arrays to an npz file, whole or not at all."""
    with pipeline.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def spread(values, digits, unit=""):
    """Returns mean ± standard deviation as text, the mean alone of a single value."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}{unit}"


def noisy_run(noise, fraction, corruption_seed, seed):
    """Returns what defines a training on wrong labels."""
    return {"noise": noise, "fraction": fraction, "corruption_seed": corruption_seed, "seed": seed}


def detection_jobs(study):
    """Yields the jobs: amounts of noise, seeds of corruption and training, and the same for cross-validations."""
    args = study.args
    for noise, fraction in NOISES[: args.num_noises]:
        seeds = product(range(args.corruption_seeds), range(args.seeds))
        runs = [
            noisy_run(noise, fraction, pipeline.CORRUPTION_SEED + c, FIRST_SEED + s)
            for c, s in seeds
        ]
        yield from ({"study": "detection", **run} for run in runs)
        for folds in args.folds:
            yield from ({"study": "cross_validation", "folds": folds, **run} for run in runs)


def print_detection(study):
    """Prints a table for each kind of noise, the best methods first."""
    for noise, fraction in dict.fromkeys(
        (row["noise"], row["fraction"]) for row in study.rows if "noise" in row
    ):
        accuracies, values = (
            {},
            {},
        )  # by seeds: a run that was repeated with other checkpoints counts once
        for row in study.found({"noise": noise, "fraction": fraction}):
            seeds = row["corruption_seed"], row["seed"]
            if row["study"] == "detection":
                accuracies[seeds] = 100 * row["accuracy"]
            for method, found in row["methods"].items():
                values.setdefault(method, {})[seeds] = found
        if not accuracies:
            continue
        print(
            f"\n{100 * fraction:.0f} % {noise} noise, test accuracy {spread([*accuracies.values()], 1, ' %')}\n"
        )
        print(
            "| method | found at 10 % | found at 20 % | AUROC | average precision | runs |\n|---|---|---|---|---|---|"
        )
        lines = []
        for method, runs in values.items():
            columns = {
                key: [found[key] for found in runs.values()] for key in next(iter(runs.values()))
            }
            cells = [
                spread([100 * x for x in columns[key]], 1, " %")
                for key in ("recall_at_10", "recall_at_20")
            ]
            cells += [spread(columns[key], 3) for key in ("auroc", "average_precision")]
            order = statistics.mean(columns["average_precision"])
            lines.append((-order, f"| {method} | {' | '.join(cells)} | {len(runs)} |"))
        print(*(line for _, line in sorted(lines)), sep="\n")


def cleaning_kinds():
    """Yields what is done about wrong labels."""
    yield {"labels": "true"}
    yield {"labels": "corrupted"}
    yield {"labels": "left out", "by": "truth", "fraction": NOISES[0][1]}
    for fraction in FRACTIONS:
        for by in RANKINGS:
            yield {"labels": "left out", "by": by, "fraction": fraction}
        for by in RANKINGS[:3]:
            yield {"labels": "put right", "by": by, "fraction": fraction}


def cleaning_jobs(study):
    """Yields the jobs: what is done about a tenth of wrong labels, by seed of the training."""
    for seed in range(FIRST_SEED, FIRST_SEED + study.args.seeds):
        yield from ({"study": "cleaning", **kind, "seed": seed} for kind in cleaning_kinds())


def by_seed(study, kind):
    """Returns the test accuracy, in percent, after what was done about wrong labels, by the seed of the training."""
    return {
        row["seed"]: 100 * row["accuracy"] for row in study.found({"study": "cleaning", **kind})
    }


def print_cleaning(study):
    """Prints test accuracies, and what is gained over doing nothing, seed by seed."""
    start = by_seed(study, {"labels": "corrupted"})
    print(
        "\n| labels | ranked by | top | test accuracy | gain, points | seeds |\n|---|---|---|---|---|---|"
    )
    names = "labels", "by", "fraction"
    rows = [
        {name: row[name] for name in names if name in row}
        for row in study.found({"study": "cleaning"})
    ]
    for kind in map(json.loads, dict.fromkeys(map(json.dumps, rows))):
        found = {seed: accuracy for seed, accuracy in by_seed(study, kind).items() if seed in start}
        if found:
            top = f"{100 * kind['fraction']:.0f} %" if "fraction" in kind else ""
            accuracy = spread([*found.values()], 2, " %")
            gain = spread([value - start[seed] for seed, value in found.items()], 2)
            print(
                f"| {kind['labels']} | {kind.get('by', '')} | {top} | {accuracy} | {gain} | {len(found)} |"
            )


def sizes(study):
    """Returns how many queries and retrained halves there are, and how often each of these is trained."""
    queries = min(study.args.num_query_examples, len(study.test))
    return {"num_queries": queries, "halves": study.args.halves, "trainings": study.args.trainings}


def retraining_jobs(study):
    """Returns the jobs: strategies, dampings, and means over several networks."""
    names = "strategy", "damping_factor", "models", "trained_on"
    return [
        {"study": "retraining", **dict(zip(names, row, strict=True)), **sizes(study)}
        for row in PREDICTIONS
    ]


def print_retraining(study):
    """Prints linear datamodeling scores; ± is the standard error over the queries."""
    rows = [*chain.from_iterable(map(study.found, retraining_jobs(study)))]
    print(
        "\n| curvature | damping | networks | of | LDS | by half of the queries | seconds |\n"
        + 7 * "|---"
        + "|"
    )
    for row in rows:
        damping = "heuristic" if row["damping_factor"] is None else row["damping_factor"]
        lds = f"{row['lds']:.3f} ± {row['standard_error']:.3f}"
        halves = ", ".join(f"{value:.3f}" for value in row.get("lds_by_half", ()))
        models = f"{row['models']} | {row['trained_on']}"
        print(
            f"| {row['strategy']} | {damping} | {models} | {lds} | {halves} | {row['score_seconds']:.0f} |"
        )
    if rows and rows[0].get("agreement"):
        print(f"Two trainings of a half agree by {rows[0]['agreement']:.3f}.")


def factors_jobs(study):
    """Returns the jobs: factors of ever fewer images, and with other pseudo-labels on all of them."""
    settings = [(None, FIRST_SEED), (None, FIRST_SEED + 1)]
    settings += [
        (examples, FIRST_SEED) for examples in FACTOR_EXAMPLES if examples < len(study.clean)
    ]
    return [
        {"study": "factors", "examples": n, "pseudo_label_seed": seed, **sizes(study)}
        for n, seed in settings
    ]


def print_factors(study):
    """Prints agreement with factors of all images, and what they are worth."""
    columns = "images | pairwise Spearman | self-influence Spearman | found at 10, 20 % | AUROC | LDS | seconds"
    print(f"\n| {columns} |\n|---|---|---|---|---|---|---|")
    for row in chain.from_iterable(map(study.found, factors_jobs(study))):
        name = f"{row['examples'] or 'all'}" + ", other pseudo-labels" * (
            row["pseudo_label_seed"] != FIRST_SEED
        )
        found = f"{100 * row['recall_at_10']:.1f}, {100 * row['recall_at_20']:.1f} % | {row['auroc']:.4f}"
        lds, seconds = f"{row['lds']:.3f}" if "lds" in row else "", row["factor_seconds"]
        agree = f"{row['pairwise_spearman']:.4f} | {row['self_spearman']:.5f}"
        print(f"| {name} | {agree} | {found} | {lds} | {seconds:.1f} |")


STUDIES = {
    "detection": (detection_jobs, print_detection),
    "cleaning": (cleaning_jobs, print_cleaning),
    "retraining": (retraining_jobs, print_retraining),
    "factors": (factors_jobs, print_factors),
}


def main():
    """Parses, runs what is not there yet, prints."""
    parser = pipeline.OneLineParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("study", choices=("similar", *STUDIES))
    flag("--dataset", choices=pipeline.LOADERS, default="synthetic")
    flag("--dataset_dir", default="./data")
    flag("--num_train_examples", type=pipeline.positive_int, help="default: all")
    flag("--num_query_examples", type=pipeline.positive_int, default=200)
    flag("--train_batch_size", type=pipeline.positive_int, default=512)
    flag("--num_train_epochs", type=pipeline.positive_int, default=25)
    flag("--learning_rate", type=float, default=0.4)
    flag("--weight_decay", type=float, default=1e-4)
    flag(
        "--seeds",
        type=pipeline.whole_number,
        default=3,
        help="of the training; 0 prints what is there",
    )
    flag("--corruption_seeds", type=int, default=3)
    flag("--num_noises", type=int, default=len(NOISES), help=f"the first so many of {NOISES}")
    folds = pipeline.number(int, "a number of folds of at least 2", lambda value: value >= 2)
    flag("--folds", type=folds, nargs="*", default=[], help="of a cross-validation, such as 2 5")
    flag(
        "--halves",
        type=pipeline.whole_number,
        default=50,
        help="networks to predict; 0 leaves them out of factors",
    )
    flag(
        "--trainings",
        type=pipeline.positive_int,
        default=1,
        help="of each half; its mean margin is predicted",
    )
    flag(
        "--folder",
        type=Path,
        default=FOLDER,
        help="keeps results.jsonl, and scores by which to go on",
    )
    args = parser.parse_args()
    if args.study == "retraining" and args.halves < 2:
        raise pipeline.UserError(
            f"argument --halves: {args.halves} networks have no order to predict: give 50"
        )
    study = Study(args)
    if args.study == "similar":
        return write_similar_labels(study)
    jobs, print_table = STUDIES[args.study]
    try:
        study.complete(jobs(study) if args.seeds else [])
    finally:
        if not study.rows:
            print(f"{study.path} has no results of {study.asked}")
        for device, precision in sorted({(row["device"], row["precision"]) for row in study.rows}):
            print(f"\nMeasured on {device} in {precision}:")
            study.machine = {"device": device, "precision": precision}
            print_table(study)


if __name__ == "__main__":
    pipeline.run(main)
