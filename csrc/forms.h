// The forms that blocks run in, of any precision: tables of them, and what a plan keeps for a block.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>

namespace mnv2 {

// A row of forms.def or int8_forms.def: `form` for at least so many threads and at most this size for each of them.
template <class Form> struct FormRow {
    int threads;
    int size;
    Form form;
};

constexpr int kAnySize = std::numeric_limits<int>::max();

// The first row that fits; the last one fits every size.
template <class Form, std::size_t N> Form look_up(const FormRow<Form> (&rows)[N], int threads, int size) {
    return std::find_if(std::begin(rows), std::end(rows),
                        [&](const FormRow<Form> &row) { return threads >= row.threads && size <= row.size; })
        ->form;
}

template <class Form> struct Forms {
    Form alone;    // in one thread
    Form together; // and in more

    Form of(int threads) const { return threads > 1 ? together : alone; }
    bool has(Form form) const { return alone == form || together == form; }
};

} // namespace mnv2
