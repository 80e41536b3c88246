"""What `bench.policies` compares, by name, as configuration overrides."""

OURS = "specserve"
OURS_WITH_MODEL = "specserve_model"  # the same controller without prompt lookup
MODEL = "policy.draft_source=model"

_BASELINES = {
    "plain": ["policy.name=none"],
    **{f"fixed_{k}": ["policy.name=fixed", f"policy.num_draft_tokens={k}"] for k in range(1, 9)},
    "threshold": ["policy.name=threshold"],
    "smartspec": ["policy.name=smartspec"],
    "adaspec_released": ["policy.name=adaspec_released"],
    "adaspec_repaired": ["policy.name=adaspec_repaired", "policy.slo_tpot_s=inf"],
    "adaptive_verification": ["policy.name=adaptive_verification"],
}
_LOOKUPS = {  # prompt lookup of a fixed length, the `ngram` method of vLLM
    f"lookup_{k}": [
        "policy.name=fixed", f"policy.num_draft_tokens={k}", "policy.draft_source=ngram"
    ]
    for k in (2, 4, 8)
}  # fmt: skip

# Where there are no texts to look up.
WITHOUT_TEXTS = {arm: [*changes, MODEL] for arm, changes in {**_BASELINES, OURS: []}.items()}
ARMS = {
    **{arm: [*changes, MODEL] for arm, changes in _BASELINES.items()},
    **_LOOKUPS,
    OURS_WITH_MODEL: [MODEL],
    OURS: [],
}
