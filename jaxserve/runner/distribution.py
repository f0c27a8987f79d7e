"""The distribution that each row samples: temperature, then min_p, top_k, top_p and typical_p.

A token is described by its distance, (best logit - logit) / temperature: its probability is exp(-distance) / mass. Truncation is two
bounds on distances, so that whether a token is kept, and with which probability, needs no array of the vocabulary's size.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxserve.runner.sampling_rows import SamplingRows
from jaxserve.runner.thresholds import covering_threshold, nearest

# Truncation mostly keeps tokens of these few blocks; where it keeps more, the whole vocabulary is searched.
_BLOCK = 128
_NUM_BLOCKS = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Distribution:
    """What each row samples; every attribute is float32 [R].

    Attributes:
        best: the largest logit.
        inverse_temperature: 1 for greedy rows.
        bound: tokens at larger distances are dropped.
        mean: expected distance of the tokens within the bound: a token's distance from it is how atypical it is.
        typical_bound: tokens that are more atypical are dropped.
        log_mass: log of the sum of exp(-distance) over the tokens that are kept.
    """

    best: jax.Array
    inverse_temperature: jax.Array
    bound: jax.Array
    mean: jax.Array
    typical_bound: jax.Array
    log_mass: jax.Array

    def distances(self, logits: jax.Array) -> jax.Array:
        """float32 [R, ...], non-negative, of logits float32 [R, ...]."""
        return (self.best[:, None] - logits) * self.inverse_temperature[:, None]

    def keeps(self, distances: jax.Array) -> jax.Array:
        """bool [R, ...], whether truncation keeps tokens at these distances."""
        return (distances <= self.bound[:, None]) & (jnp.abs(distances - self.mean[:, None]) <= self.typical_bound[:, None])

    def logprobs(self, logits: jax.Array) -> jax.Array:
        """float32 [R, ...] of logits float32 [R, ...]; -inf where truncation drops the token."""
        distances = self.distances(logits)
        return jnp.where(self.keeps(distances), -distances - self.log_mass[:, None], -jnp.inf)


def whole_distribution(logits: jax.Array, rows: SamplingRows) -> Distribution:
    """Temperature alone; greedy rows have temperature 1. log_mass is still 0.

    Args:
        logits: float32 [R, V].
        rows: R rows.
    """
    best = jnp.max(logits, axis=1)
    nothing, everything = jnp.zeros_like(best), jnp.full_like(best, jnp.inf)
    inverse = jnp.where(rows.temperature > jnp.float32(0), jnp.float32(1) / rows.temperature, jnp.float32(1))
    return Distribution(best, inverse, bound=everything, mean=nothing, typical_bound=everything, log_mass=nothing)


def sum_masses(whole: Distribution, logits: jax.Array) -> Distribution:
    """The same with its log_mass."""
    return replace(whole, log_mass=jnp.log(jnp.sum(jnp.exp(-whole.distances(logits)), axis=1)))


def truncate(whole: Distribution, logits: jax.Array, rows: SamplingRows) -> Distribution:
    """Apply min_p, top_k, top_p and typical_p, each to what the one before keeps.

    Ties are kept or dropped together: top_k keeps every token as likely as the k-th, top_p and typical_p every token as likely (as
    typical) as the one that makes up the mass.

    Args:
        whole: with its log_mass.
        logits: float32 [R, V].
        rows: R rows.
    """
    distances = whole.distances(logits)
    mass = jnp.exp(whole.log_mass)
    if distances.shape[1] <= 2 * _BLOCK * _NUM_BLOCKS:
        return _bounded(whole, distances, mass, rows)[0]
    near, beyond = nearest(distances, _BLOCK, _NUM_BLOCKS)
    truncated, reach = _bounded(whole, near, mass, rows)
    found = reach < beyond

    def search_all() -> Distribution:
        # Rows that the near tokens told all about keep that: what a row gets must not depend on the others, not even in its last bit.
        everywhere, _ = _bounded(whole, distances, mass, rows)
        return jax.tree.map(lambda x, y: jnp.where(found, x, y), truncated, everywhere)

    return jax.lax.cond(jnp.all(found), lambda: truncated, search_all)


def _bounded(whole: Distribution, distances: jax.Array, mass: jax.Array, rows: SamplingRows) -> tuple[Distribution, jax.Array]:
    """Truncate, seeing only some of the tokens.

    Args:
        whole: what is truncated.
        distances: float32 [R, M], of any M tokens.
        mass: float32 [R], of all tokens.
        rows: R rows.

    Returns:
        The truncated distribution, and float32 [R], how far out the tokens must all have been seen for it to be right.
    """
    has_min_p, has_top_k = rows.min_p > jnp.float32(0), rows.top_k > jnp.int32(0)
    has_top_p, has_typical_p = rows.top_p < jnp.float32(1), rows.typical_p < jnp.float32(1)
    weights = jnp.exp(-distances)

    def mass_within(bound: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(distances <= bound[:, None], weights, jnp.float32(0)), axis=1)

    bound = covering_threshold(distances, jnp.ones_like(weights), rows.top_k.astype(jnp.float32), has_top_k)
    bound = jnp.minimum(bound, -jnp.log(rows.min_p))
    reach = jnp.where(has_min_p | has_top_k, bound, jnp.float32(-1))
    mass = jnp.where(has_min_p | has_top_k, mass_within(bound), mass)

    bound = jnp.minimum(bound, covering_threshold(distances, weights, rows.top_p * mass, has_top_p))
    reach = jnp.where(has_top_p, jnp.maximum(reach, bound), reach)
    mass = jnp.where(has_top_p, mass_within(bound), mass)

    kept = (distances <= bound[:, None]) & (weights > jnp.float32(0))
    weights = jnp.where(kept, weights, jnp.float32(0))
    mean = jnp.sum(weights * jnp.where(kept, distances, jnp.float32(0)), axis=1) / mass
    atypical = jnp.where(kept, jnp.abs(distances - mean[:, None]), jnp.inf)
    typical_bound = covering_threshold(atypical, weights, rows.typical_p * mass, has_typical_p)
    reach = jnp.where(has_typical_p, jnp.maximum(reach, bound), reach)
    typical_mass = jnp.sum(jnp.where(atypical <= typical_bound[:, None], weights, jnp.float32(0)), axis=1)
    mass = jnp.where(has_typical_p, typical_mass, mass)
    # The logarithm of the exponential is not always the same number: a row without truncation keeps what it has.
    log_mass = jnp.where(has_min_p | has_top_k | has_top_p | has_typical_p, jnp.log(mass), whole.log_mass)
    return replace(whole, bound=bound, mean=mean, typical_bound=typical_bound, log_mass=log_mass), reach
