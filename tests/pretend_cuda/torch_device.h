// The part of the pretend CUDA device that speaks of torch.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>

#include <map>
#include <optional>
#include <string>

#include "device.h"

namespace pretend {

c10::Allocator* device_allocator();
bool is_pinned(const void* pointer);

// Every generator of the device holds one of the CPU.
std::optional<at::Generator> cpu_generator(const at::Generator& generator);
at::Generator default_generator(int64_t device);
at::Generator default_cpu_generator(int device);

void set_sync_debug_mode(int mode);   // 2: what waits is an error
int get_sync_debug_mode();
void set_counting(bool on);                 // starts from nothing
std::map<std::string, int64_t> counted();   // operators, and "sync ..." where the host would wait

}   // namespace pretend
