//! A spinner on a terminal, for work that takes longer than a second.

use indicatif::ProgressBar;
use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Quicker work shows nothing.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(100);

/// Shows the stage that runs; ends when dropped.
pub struct Progress {
    stages: Option<Sender<&'static str>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts to wait; does nothing when stderr is no terminal.
    pub fn start() -> Progress {
        if !std::io::stderr().is_terminal() {
            return Progress {
                stages: None,
                thread: None,
            };
        }
        let (stages, receiver) = channel();
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            let mut bar: Option<ProgressBar> = None;
            let mut label = "";
            loop {
                match receiver.recv_timeout(TICK) {
                    Ok(next) => label = next,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                if bar.is_none() && started.elapsed() > PATIENCE {
                    bar = Some(ProgressBar::new_spinner());
                }
                if let Some(bar) = &bar {
                    bar.set_message(label);
                    bar.tick();
                }
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
        });
        Progress {
            stages: Some(stages),
            thread: Some(thread),
        }
    }

    /// Says which stage starts.
    pub fn stage(&self, label: &'static str) {
        if let Some(stages) = &self.stages {
            // A spinner that ended is not worth failing for.
            let _ = stages.send(label);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stages = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
