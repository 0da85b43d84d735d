"""What the evidence compares: data, backbones, and variants of a model."""

from collections.abc import Iterable

from benchmarks.experiments.runs import Data

__all__ = ["BACKBONES", "COMPARED", "DATA", "PROBED", "PROBED_VARIANT", "RANKED_LAST", "variants"]

BACKBONES = ("din", "dien", "bst", "transact", "interformer")


# In `smooth` nothing chooses a map; it is a control.
WORLD_ROUTES = {
    "composed": "[[category], [hour], [category_history]]",
    "tree": "[[category], [category], [category]]",
    "smooth": "[[category], [hour], [category_history]]",
}
# Of real sets for backbones that were not tuned there, whatever their recipes have.
UNTUNED = {
    "train.learning_rate": "0.002",
    "train.table_learning_rate": "0.1",
    "train.decay.kind": "cosine",
    "train.expert_lr_scale": "5.0",
    "train.frozen_share": "0.06",
}
PREPARED = {
    "ml-1m": ("bst-movielens", "[[genre_set], [age], [history_genre_set]]"),
    "beauty": ("bst-amazon-beauty", "[[category], [attributes], [history_category]]"),
    "toys": ("bst-amazon-toys", "[[category], [attributes], [history_category]]"),
    "trivago": ("bst-trivago", "[[rank], [platform], [history_action]]"),
}
DATA = {
    **{
        world: Data(
            recipe="bst-synthetic",
            options={
                "data.synthetic": world,
                "data.train_rows": "768000",
                "data.eval_rows": "65536",
            },
            head=(64, 32),
            route_by=WORLD_ROUTES[world],
            tuned_on="composed",
        )
        for world in WORLD_ROUTES
    },
    # Streams as long as those on which prototypes found that learned routing pays.
    **{
        f"{world}-long": Data(
            recipe="bst-synthetic",
            options={
                "data.synthetic": world,
                "data.train_rows": "6144000",
                "data.eval_rows": "65536",
                "checkpoint.every_steps": "6000",
            },
            head=(64, 32),
            route_by=WORLD_ROUTES[world],
            tuned_on="composed",
        )
        for world in ("composed", "tree")
    },
    # Of the default recipe's model, and long enough for a probe to listen before experts join.
    **{
        f"{world}-3m": Data(
            recipe="bst-synthetic",
            options={
                "data.synthetic": world,
                "data.train_rows": "3072000",
                "checkpoint.every_steps": "1000",
            },
            head=(128, 64),
            route_by=WORLD_ROUTES[world],
            tuned_on=f"{world}-3m",
        )
        for world in WORLD_ROUTES
    },
    **{
        name: Data(
            recipe=recipe,
            options=UNTUNED,
            head=(256, 128),
            route_by=route_by,
            prepared=True,
            tuned_on=name,
        )
        for name, (recipe, route_by) in PREPARED.items()
    },
    # Thinned by `streams`: few clicks, and an hour that hardly varies.
    **{
        f"composed-{stream}": Data(
            recipe="bst-synthetic",
            head=(64, 32),
            route_by=WORLD_ROUTES["composed"],
            prepared=True,
            tuned_on="composed",
        )
        for stream in ("rare", "skewed")
    },
    # MovieLens with frozen vectors of its movies: of their titles, and drawn at random.
    **{
        f"ml-1m-{vectors}": Data(
            recipe=PREPARED["ml-1m"][0],
            options={"data.data_schema": "null"},
            head=(256, 128),
            route_by=PREPARED["ml-1m"][1],
            prepared=True,
            tuned_on="ml-1m",
        )
        for vectors in ("titles", "random")
    },
}

# Stand for what a probe finds, in options of a case.
PROBED = {"model.hilomoe.route_by": "probed"}
RANKED_LAST = {"model.hilomoe.route_by": "ranked last"}
PROBED_VARIANT = "head rank 4, probed"
LAYERS = 3
HALVED_ATTENTION = "[32]"  # all recipes of DIN that are compared have 64 units

# Side by side in the table of all data sets and backbones.
COMPARED = (
    "wider",
    "auto",
    PROBED_VARIANT,
    "head rank 4",
    "head rank 4, random",
    "head rank 4, by side",
    "head rank 4, by feature",
    "head rank 4, by feature, random",
)

# What one can name where nothing is known.
SIDES = {"model.hilomoe.route_by": "[[candidate], [context], [histories]]"}

# 450 steps of 3,000 without experts, of which the last 400 are listened to.
AUTO = {
    "model.hilomoe.route_by": "auto",
    "model.hilomoe.probe_steps": "400",
    "train.backbone_share": "0.15",
}


def experts(sites: str, rank: int, routing: str = "row") -> dict[str, str]:
    """Options of HiLoMoE with 3 layers of 8 experts."""
    return {
        "model.hilomoe.sites": f"[{sites}]",
        "model.hilomoe.rank": str(rank),
        "model.hilomoe.routing": routing,
    }


def variants(data: Data) -> dict[str, dict[str, str]]:
    """The models that are compared, by name."""
    head = data.head

    def dense(widths: Iterable[int]) -> dict[str, str]:
        return {"model.hilomoe": "null", "model.head": f"[{', '.join(map(str, widths))}]"}

    by_feature = {"model.hilomoe.route_by": data.route_by}
    # Of DIN, whose attention takes most of its FLOPs; other backbones have no such widths.
    halved = {
        "model.head": f"[{', '.join(str(width // 2) for width in head)}]",
        "model.din.attention_units": HALVED_ATTENTION,
    }
    own = {"model.head": f"[{', '.join(map(str, head))}]"}
    return {
        "plain": dense(head),
        "narrower": dense(width // 2 for width in head),
        "wider": dense(width * 2 for width in head),
        "widest": dense(width * 4 for width in head),
        "deeper": dense((*head, head[-1])),
        "head rank 1": own | experts("head", 1),
        "head rank 4": own | experts("head", 4),
        "all rank 1": own | experts("all", 1),
        "all rank 4": own | experts("all", 4),
        "head rank 4, random": own | experts("head", 4, "random"),
        "head rank 4, by sample": own | experts("head", 4, "sample"),
        "all rank 4, by sample": own | experts("all", 4, "sample"),
        "head rank 4, by side": own | experts("head", 4, "sample") | SIDES,
        "head rank 4, by feature": own | experts("head", 4, "sample") | by_feature,
        "head rank 4, auto": own | experts("head", 4, "sample") | AUTO,
        "head rank 4, by feature, random": own | experts("head", 4, "random") | by_feature,
        PROBED_VARIANT: own | experts("head", 4, "sample") | PROBED,
        "head rank 4, probed, fast keys": own
        | experts("head", 4, "sample")
        | PROBED
        | {"train.key_lr_scale": "10.0"},
        "head rank 4, probed, random": own | experts("head", 4, "random") | PROBED,
        "head rank 4, probed, ranked last": own | experts("head", 4, "sample") | RANKED_LAST,
        "all rank 4, probed": own | experts("all", 4, "sample") | PROBED,
        "halved": dense(head) | halved,
        "halved, head rank 4, probed": halved | experts("head", 4, "sample") | PROBED,
        "halved, all rank 4, probed": halved | experts("all", 4, "sample") | PROBED,
        "narrower, head rank 4, probed": {
            "model.head": f"[{', '.join(str(width // 2) for width in head)}]",
            **experts("head", 4, "sample"),
            **PROBED,
        },
    }
