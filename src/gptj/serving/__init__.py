"""A server that answers many at once with one model, over HTTP as OpenAI's clients speak it.

Table of contents:

    Engine                             one thread that owns the model            engine
    Continuation, Piece                one text that is being made               continuation
    RunningBatch                       rows that join and leave between steps    batch
    Prefill, Pace                      prompts that are read in pieces           prefill
    warm_up                            what is compiled, before others ask      warming
    PrefixStore                        what many prompts begin with, once        prefixes
                                       a request's fields, each with its rule    requests
                                       what is answered, whole or piece by piece answers
                                       a folder's chat template                  chat
    Metrics                            counters as Prometheus reads them         metrics
                                       routes, limits and errors                 app, channel, refusals
                                       the socket, its timeouts and its end      server

The engine needs no web framework, and nothing here knows which backend computes: a `Decoder` is all that it sees.
"""

from __future__ import annotations
