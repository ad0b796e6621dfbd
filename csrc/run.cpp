#include "run.h"

#include <type_traits>

namespace mnv2 {

template <class T> typename Runner<T>::Arena Runner<T>::arena(std::byte *memory, const Team &team) const {
    Arena a;
    const auto take = [&memory](std::size_t bytes, auto *&tensor) {
        tensor = reinterpret_cast<std::remove_reference_t<decltype(tensor)>>(memory);
        memory += bytes;
    };
    take(plan_.activation, a.activation[0]);
    take(plan_.activation, a.activation[1]);
    take(plan_.hidden, a.hidden);
    take(plan_.filtered, a.filtered);
    take(plan_.sums, a.sums);
    a.scratch = memory + team.rank() * plan_.scratch;
    return a;
}

template <class T> void Runner<T>::run(Team &team, std::byte *memory, void *features) const {
    share_images(team, plan_, call_.n, memory, [&](Team &part, std::byte *at, int begin, int end) {
        const Arena arena = this->arena(at, part);
        for (int k = begin; k < end; ++k)
            image(part, arena, k, features);
    });
    if (steps_.back().form != Step::Form::linear || plan_.head_classifies(call_.n))
        return;
    const int last = static_cast<int>(steps_.size()) - 1;
    StepClock clock(seconds_, team);
    linear(team, last, static_cast<const T *>(last > 0 ? features : call_.x), call_.n);
    clock.stop(last);
}

// Every step for one image, but for a linear last one, which runs once for all.
template <class T> void Runner<T>::image(Team &team, const Arena &arena, int image, void *features) const {
    const T *x = nullptr; // the call's own
    StepClock clock(seconds_, team);
    for (std::size_t i = 0; i < steps_.size() && steps_[i].form != Step::Form::linear; ++i) {
        const int step = static_cast<int>(i);
        const Ends t = place(step, x, arena.activation[i % 2], image);
        run_step(team, arena, step, t, features);
        team.sync();
        clock.stop(step);
        x = t.y;
    }
}

// Where a step reads and writes: `x` and `y`, but at the ends of the network the caller's tensors.
template <class T> typename Runner<T>::Ends Runner<T>::place(int step, const T *x, T *y, int image) const {
    const Step &s = steps_[step];
    const LayerDesc &first = layers_[s.first()].desc, &d = layers_[s.last].desc;
    Ends t{x, padded(first.cin), y, padded(d.cout), image};
    if (!x && first.kind != Kind::stem) {
        t.x = static_cast<const T *>(call_.x) + image * call_.stride_n;
        t.x_ld = call_.stride_w;
    }
    if (s.form != Step::Form::head && step + 1 == static_cast<int>(steps_.size())) {
        const StepPlan &p = plan_.steps[step];
        t.y = static_cast<T *>(call_.y) + static_cast<std::ptrdiff_t>(image) * p.ho * p.wo * d.cout;
        t.y_ld = d.cout;
    }
    return t;
}

template <class T>
void Runner<T>::run_step(Team &team, const Arena &arena, int step, const Ends &t, void *features) const {
    const Step::Form form = steps_[step].form;
    if (form == Step::Form::head)
        head(team, arena, step, t, features);
    else if (form == Step::Form::single)
        single(team, arena, step, t);
    else
        block(team, arena, step, t);
}

template class Runner<float>;
template class Runner<bf16>;

} // namespace mnv2
