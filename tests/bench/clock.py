"""A clock that is made up, and cases that take no time."""

from linattn.bench.gpu_cases import GpuCase

SMALL = [
    GpuCase("forward", 2, 4, 70, 16, 1.0),
    GpuCase("forward-backward", 2, 2, 70, 16, 0.5),
    GpuCase("cosformer", 2, 2, 70, 16),
    GpuCase("cosformer-backward", 1, 2, 70, 16),
    GpuCase("cosformer-not-causal", 2, 2, 70, 16),
    GpuCase("lrpe", 1, 2, 70, 16),
    GpuCase("decode", 3, 2, 1, 16, 1.0),
]


class Clock:
    """Calls everything, and says what it was told to."""

    def __init__(self, ms=1.0):
        self.ms, self.extra = ms, 7 * 10**6
        self.asked = []

    def gigabytes_per_second(self):
        return 1000.0

    def first(self, work):
        return 2.5, work()

    def once(self, work):
        work()
        return self.ms, self.extra

    def milliseconds(self, work, medians=1, about=None):
        self.asked.append(medians)
        work()
        return self.ms

    def replayed(self, work, medians=1):
        return self.ms / 2

    def host_microseconds(self, work):
        work()
        return 39.0

    def peak_bytes(self, work):
        work()
        return 3 * 10**9
