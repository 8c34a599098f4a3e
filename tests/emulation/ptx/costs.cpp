// What launches cost: counters of each instruction, written as JSON for costs.py.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace ptx {

const char* name_of(Kind kind) {
    static const char* const kNames[] = {"tensor",   "fp32",        "fp64",         "special",     "convert",
                                         "integer",  "predicate",   "move",         "shared_load", "shared_store",
                                         "ldmatrix", "global_load", "global_store", "atomic",      "parameter",
                                         "copy",     "shuffle",     "branch",       "sync",        "added"};
    return kNames[static_cast<size_t>(kind)];
}

std::string& costs_file() {
    static std::string path;
    return path;
}

bool are_costs_counted() { return !costs_file().empty(); }

// An access of more than 4 bytes a lane takes a wavefront for each 128 bytes: of half the lanes, or of a quarter.
void count_shared(Warp& warp, const uint32_t* addresses, uint32_t bytes, uint32_t mask) {
    if (!are_costs_counted()) return;
    Counter& counter = warp.kernel->counters[static_cast<size_t>(warp.pc)];
    const int phases = std::max(1, static_cast<int>(bytes) / 4), lanes = 32 / phases;
    for (int phase = 0; phase < phases; ++phase) {
        std::vector<uint32_t> words[32];   // of each bank
        size_t most = 0;
        for (int l = phase * lanes; l < (phase + 1) * lanes; ++l) {
            if (!(mask >> l & 1)) continue;
            for (uint32_t word = addresses[l] / 4; word <= (addresses[l] + bytes - 1) / 4; ++word) {
                auto& bank = words[word % 32];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        counter.passes += most;
        counter.least += most > 0;
    }
}

void count_global(Warp& warp, const uint64_t* addresses, uint32_t bytes, uint32_t mask) {
    if (!are_costs_counted()) return;
    constexpr uint64_t kSector = 32;
    Counter& counter = warp.kernel->counters[static_cast<size_t>(warp.pc)];
    std::vector<uint64_t> sectors;
    for_lanes(mask, [&](int l) {
        for (uint64_t n = addresses[l] / kSector; n <= (addresses[l] + bytes - 1) / kSector; ++n) sectors.push_back(n);
    });
    std::sort(sectors.begin(), sectors.end());
    counter.passes += static_cast<uint64_t>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
    counter.least += (static_cast<uint64_t>(__builtin_popcount(mask)) * bytes + kSector - 1) / kSector;
}

void write_costs(const Kernel& kernel, Dim grid, unsigned threads, size_t shared_bytes) {
    FILE* file = fopen(costs_file().c_str(), "a");
    if (!file) fail("cannot write %s", costs_file().c_str());
    fprintf(file, "{\"kernel\": \"%s\", \"blocks\": %lu, \"threads\": %u, \"shared\": %zu, \"code\": [",
            kernel.name.c_str(), uint64_t{grid.x} * grid.y * grid.z, threads, shared_bytes);
    const char* separator = "";
    for (size_t n = 0; n < kernel.code.size(); ++n) {
        const Instruction& i = kernel.code[n];
        const Counter& c = kernel.counters[n];
        fprintf(file, "%s[\"%s\", \"%s\", \"%s\", %lu, %lu, %lu, %lu, %d, %d]", separator, name_of(i.kind),
                kernel.place_of(i).c_str(), kernel.text_of(i).c_str(), c.runs, c.lanes, c.passes, c.least, i.width,
                i.target);
        separator = ", ";
    }
    fprintf(file, "]}\n");
    fclose(file);
}

}   // namespace ptx
